#!/bin/sh
# The five steps of doc/matmul.md, from the triple loop to the project's matmul: checks them, then measures them.
#
#     make bench BENCH=matmul        or   sh dev/bench/matmul.sh [--json] [M I O]..
#
# M I O: rows of X, inputs and outputs of a linear layer; without any, those of GPT-2. What is compiled is up to make:
# make bench BENCH=matmul CC=clang MARCH=-march=x86-64-v3. BENCH_TINY=1 takes seconds, and its figures mean nothing.
# Exit status 1: a step made a wrong product.
set -e
cd "$(dirname "$0")/../.."
LC_ALL=C
export LC_ALL
json=0
[ "$1" != --json ] || { json=1; shift; }
${MAKE:-make} -s -B build/bench_matmul_steps >&2 # anew, for it may have been built with other flags
records=$(build/bench_matmul_steps "$@")
machine="$(nproc) x $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), load $(cut -d ' ' -f 1 /proc/loadavg)"
echo "$records" | awk -v json=$json -v machine="$machine" '
function summary(table, key, n,  x, i, j, t) { # sets median, least, most
    for (i = 1; i <= n; i++) {
        t = table[key, i]
        for (j = i; j > 1 && t < x[j - 1]; j--) x[j] = x[j - 1]
        x[j] = t
    }
    median = (x[int((n + 1) / 2)] + x[int((n + 2) / 2)]) / 2; least = x[1]; most = x[n]
}
function add(key, rate, part) {
    if (!rounds[key]++) keys[++distinct] = key
    rates[key, rounds[key]] = rate; parts[key, rounds[key]] = part
}
function mean(step, what) { return exp(sum[step, what] / terms[step, what]) }
function title(product) { return product == "XWT" ? "X W\047" : product == "dYW" ? "dY W" : "dY\047 X" }

$1 == "program" {
    threads["one"] = 1; threads["all"] = $2; bytes = $3; compiler = $4
    for (i = 5; i <= NF; i++) compiler = compiler " " $i
}
$1 == "read" { add("read " $2 "K" " " $3, $4, 0) }
$1 == "rate" { add("fma - " $7, $9, 0); add("rate " $2 " " $7 " " $3 " " $4 " " $5 " " $6, $8, $8 / $9) }
END {
    if (json)
        printf "{\"machine\": \"%s\", \"compiler\": \"%s\", \"vector_bytes\": %d", machine, compiler, bytes
    else printf "%s; compiler %s, vectors of %d bytes\n\n", machine, compiler, bytes
    spread = json ? "\"median\": %.2f, \"smallest\": %.2f, \"largest\": %.2f" : " %.1f | %.1f .. %.1f |"

    if (json) printf ",\n\"ceilings\": ["
    else print "| ceiling | threads | median | smallest .. largest |\n|---|---|---|---|"
    for (k = 1; k <= distinct; k++) {
        split(keys[k], f, " ")
        if (f[1] == "rate") continue
        what = f[1] == "fma" ? "multiply-adds, GFLOP/s" : "reading " f[2] "iB, GB/s"
        summary(rates, keys[k], rounds[keys[k]])
        if (json) printf "%s", comma
        printf json ? "{\"ceiling\": \"%s\", \"threads\": %d, " : "| %s | %d |", what, threads[f[3]]
        printf spread (json ? "}" : "\n"), median, least, most
        comma = ",\n"
    }
    if (json) printf "],\n\"steps\": ["
    comma = ""
    for (k = 1; k <= distinct; k++) {
        split(keys[k], f, " ")
        if (f[1] != "rate") continue
        shape = title(f[2]) ", M " f[5] ", N " f[6] ", K " f[7]
        if (!json && shape != last)
            print "\n| " shape " | threads | GFLOP/s | smallest .. largest | of the ceiling |\n|---|---|---|---|---|"
        last = shape
        summary(parts, keys[k], rounds[keys[k]])
        part = median
        summary(rates, keys[k], rounds[keys[k]])
        if (json)
            printf "%s{\"product\": \"%s\", \"M\": %d, \"N\": %d, \"K\": %d, ", comma, title(f[2]), f[5], f[6], f[7]
        printf json ? "\"step\": \"%s\", \"threads\": %d, " : "| %s | %d |", f[4], threads[f[3]]
        printf spread (json ? ", \"of_ceiling\": %.4f}" : " %.3f |\n"), median, least, most, part
        comma = ",\n"
        step = f[3] " " f[4]
        if (!(step in seen)) order[++steps] = step
        seen[step] = 1
        sum[step, f[2]] += log(median); terms[step, f[2]]++
        sum[step, "part"] += log(part); terms[step, "part"]++
    }
    if (json) { print "]}"; exit }
    print "\nGFLOP/s, geometric means over the shapes:\n"
    print "| step | threads | X W\047 | dY W | dY\047 X | of the ceiling |\n|---|---|---|---|---|---|"
    for (k = 1; k <= steps; k++) {
        split(order[k], f, " ")
        printf "| %s | %d | %.1f | %.1f | %.1f | %.3f |\n", f[2], threads[f[1]], mean(order[k], "XWT"),
            mean(order[k], "dYW"), mean(order[k], "dYTX"), mean(order[k], "part")
    }
}'
