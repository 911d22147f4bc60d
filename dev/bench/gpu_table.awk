# gpu_table.awk - tables and JSON from the records of gpu.sh: awk -v json=FILE -f records.awk -f gpu_table.awk RECORDS
#
# Ratios are made so that more is better, and 1 is the goal in columns named /goal. README.md has the goals.

function ratio(a, b) { return a > 0 && b > 0 ? sprintf("%.2f", a / b) : "-" }
function per_second(work, ms) { return ms > 0 ? work / ms * 1e3 : 0 }
function whole(x) { return x > 0 ? sprintf("%.0f", x) : "-" }
function shown(x, unit) { return x > 0 ? sprintf("%.4g", x / unit) : "-" }

BEGIN {
    goal["copy"] = 0.80; goal["product"] = 0.95 # of a copy's GB/s; of PyTorch's product
    goal["attention_forward"] = 0.70; goal["attention_backward"] = 0.60 # of SDPA's flash attention
    goal["bf16"] = 1.0; goal["tf32"] = 0.85; goal["fp32"] = 0.95 # tokens/s, of PyTorch's
    goal["mfu"] = 0.44; goal["floor"] = 0.67 # 355M, 16 sequences, bf16
    goal["tp2"] = 1.15; goal["tp4"] = 1.35; goal["tp8"] = 1.75 # time of P ranks on one GPU, of one rank's
    printf "[" > json
}

{
    parse_record()
    printf "%s\n{%s}", (NR > 1 ? "," : ""), line > json
    kind = r["kind"]; p = r["precision"]; who = r["who"]
    if (kind == "device") { device = r["name"]; peak[p] = r["peak"] }
    if (kind == "ceiling" && r["name"] == "copy") { copy = r["bytes"] / r["ms"] * 1e3 }
    if (kind == "ceiling" && r["name"] == "product") {
        product[p] = r["flops"] / r["ms"] * 1e3
        precisions = precisions " " p
    }
    if (kind == "check") checks[++n_checks] = sprintf("%-34s %s", r["name"], r["result"])
    if (kind == "note" && !seen[$0]++) notes[++n_notes] = r["name"] ": " r["text"]
    if (kind ~ /^(product|move|attention|operator)$/) {
        key = p " " r["name"]
        if (!(key in operator)) { operator[key] = 1; operators[++n_operators] = key }
        ms[who, key] = r["ms"]; flops[key] += r["flops"]; bytes[key] += r["bytes"]
        if (kind != "operator") class[key] = kind
    }
    if (kind == "step") {
        key = p " " r["name"] " " r["batch"] " " r["dropout"] " " r["tp"]
        if (!(key in step)) { step[key] = 1; steps[++n_steps] = key }
        ms[who, key] = r["ms"]; memory[who, key] = r["memory"]
        if (who == "megatron") { tokens[key] = r["tokens"]; flops[key] = r["flops"]; full[key] = r["flops_full"] }
    }
}

END {
    print "\n]" > json
    for (i = 1; i <= n_checks; i++) print (i == 1 ? "\nChecks\n" : "") checks[i]
    if (device) printf("\n%s: a copy moves %s GB/s\n", device, shown(copy, 1e9))
    n = split(precisions, list, " ")
    for (i = 1; i <= n; i++) {
        p = list[i]
        printf("%s: a product makes %s TFLOP/s (data sheet: %s)\n", p, shown(product[p], 1e12), shown(peak[p], 1e12))
    }

    row = "%-4s %-34s %9s %8s %8s %8s %8s %7s %6s\n"
    if (n_operators) {
        print ""
        printf(row, "", "operator", "ms", "GB/s", "TFLOP/s", "ceiling", "torch ms", "torch/", "/goal")
    }
    for (i = 1; i <= n_operators; i++) {
        key = operators[i]; split(key, f, " "); p = f[1]; split(f[2], base, "/")
        mine = ms["megatron", key]; peer = ms["pytorch", key]; achieved = reached = "-"
        gb = per_second(bytes[key], mine); tf = per_second(flops[key], mine)
        if (class[key] == "move") { reached = percent(gb, copy); achieved = ratio(gb, copy * goal["copy"]) }
        else reached = percent(tf, product[p])
        if (class[key] == "product") achieved = ratio(peer, mine * goal["product"])
        if (class[key] == "attention" && p == "bf16") achieved = ratio(peer, mine * goal[base[1]])
        printf(row, p, f[2], shown(mine, 1), shown(gb, 1e9), shown(tf, 1e12), reached, shown(peer, 1),
            ratio(peer, mine), achieved)
    }

    row = "%-4s %-5s %5s %4s %2s %8s %8s %15s %15s %6s %9s %6s %6s %8s %6s\n"
    if (n_steps) {
        print ""
        printf(row, "", "step", "batch", "drop", "tp", "ms", "tokens/s", "MFU (full)", "product (full)", "GB",
            "torch t/s", "torch/", "/goal", "torch GB", "torch/")
    }
    for (i = 1; i <= n_steps; i++) {
        key = steps[i]; split(key, f, " "); p = f[1]; tp = f[5]
        mine = ms["megatron", key]; peer = ms["pytorch", key]; one = ms["megatron", substr(key, 1, length(key) - 1) "1"]
        rate = per_second(flops[key], mine); all = per_second(full[key], mine)
        achieved = tp > 1 ? ratio(goal["tp" tp] * one, mine) : ratio(peer, mine * goal[p])
        printf(row, p, f[2], f[3], f[4], tp, shown(mine, 1), whole(per_second(tokens[key], mine)),
            percent(rate, peak[p]) " (" percent(all, peak[p]) ")",
            percent(rate, product[p]) " (" percent(all, product[p]) ")",
            shown(memory["megatron", key], 1e9), whole(per_second(tokens[key], peer)), ratio(peer, mine), achieved,
            shown(memory["pytorch", key], 1e9), ratio(memory["pytorch", key], memory["megatron", key]))
    }
    mine = ms["megatron", "bf16 355M 16 0 1"] / 1e3
    if (mine > 0 && copy > 0) {
        floor = 37.7e12 / product["bf16"] + 35.8e9 / copy # FLOPs and bytes of this step that nobody can avoid
        rate = flops["bf16 355M 16 0 1"] / mine
        printf("\nbf16 355M, batch 16: this GPU's floor %.1f ms; floor / time %s, /goal %s; MFU /goal %s\n",
            floor * 1e3, ratio(floor, mine), ratio(floor, mine * goal["floor"]),
            ratio(rate, peak["bf16"] * goal["mfu"]))
    }
    for (i = 1; i <= n_notes; i++) print (i == 1 ? "\nNotes\n" : "") notes[i]
}
