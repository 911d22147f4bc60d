# cpu_table.awk - tables or JSON from the records of cpu.sh: awk -v json=1 -f records.awk -f cpu_table.awk RECORDS
#
# Every figure is the median of the rounds, with their smallest and largest; a ratio's are those of the rounds' own
# ratios. Ratios are of speeds, ours to the other's: more is better.

{
    parse_record()
    kind = r["kind"]; name = r["name"]
    if (kind == "info") { info[name] = r["text"]; gsub(/_/, " ", info[name]) }
    else if (kind == "note") {
        text = (name == "" ? "" : name " ") r["text"]; gsub(/_/, " ", text)
        if (!seen[text]++) note[++notes] = text
    }
    else if (kind == "error") { if (!errors++ || !(r["value"] <= worst)) { worst = r["value"]; worst_of = name } }
    else if (kind == "memory") memory[name] = r["value"]
    else if (r["round"] > 0) {
        part = r["part"]; key = name "|" (part == "breakdown" ? r["operator"] : r["who"]) "|" r["threads"]
        if (!((part, name) in row)) { row[part, name] = 1; names[part] = names[part] " " name }
        if (part == "breakdown" && !((name, r["operator"]) in operator)) {
            operator[name, r["operator"]] = 1; operators[name] = operators[name] " " r["operator"]
            product[r["operator"]] = r["product"]
        }
        ms[part, key, r["round"]] = r["ms"]; work[part, key] = r["work"]
        if ("parameters" in r) parameters[name] = r["parameters"]
        if (r["round"] > rounds) rounds = r["round"]
        if (r["threads"] > all) all = r["threads"]
    }
}

# ---- Series: v[1..n], a number of each round that has one. figure() makes med, low, high of it, and puts them in JSON.

function begin() { n = 0; split("", v) }
function put(x) { v[++n] = x }
function figure(part, name, what, threads, unit,  i, j, x) {
    for (i = 2; i <= n; i++) {
        x = v[i]
        for (j = i - 1; j > 0 && v[j] > x; j--) v[j + 1] = v[j]
        v[j + 1] = x
    }
    med = n ? (v[int((n + 1) / 2)] + v[int((n + 2) / 2)]) / 2 : 0; low = v[1]; high = v[n]
    if (n) figures = figures sprintf("%s{\"part\": %s, \"name\": %s, \"what\": %s, \"threads\": %d, \"unit\": %s, " \
        "\"median\": %.6g, \"smallest\": %.6g, \"largest\": %.6g}", figures ? ",\n  " : "", quoted(part), quoted(name),
        quoted(what), threads, quoted(unit), med, low, high)
    return n ? med : ""
}
function time(part, key,  i) {
    begin()
    for (i = 1; i <= rounds; i++) if ((part, key, i) in ms) put(ms[part, key, i])
}
function rate(part, key, factor,  i) { # factor: units of work in a call
    begin()
    for (i = 1; i <= rounds; i++) if ((part, key, i) in ms) put(factor * 1e3 / ms[part, key, i])
}
function ratio(part, key, other,  i) {
    begin()
    for (i = 1; i <= rounds; i++)
        if ((part, key, i) in ms && (part, other, i) in ms) put(ms[part, other, i] / ms[part, key, i])
}
function shown(format) { return n ? sprintf(format, med) : "" }
function spread(format) { return n ? sprintf(format " (" format ".." format ")", med, low, high) : "" }
function say(text) { if (!json) print text }
function title(text) { say("\n## " text "\n") }
function threads_of(count) { return count == 1 ? "1 thread" : count " threads" }

# One cell of a table, and its figure.
function time_cell(part, name, who, P) {
    time(part, name "|" who "|" P); figure(part, name, who, P, "ms")
    return " " spread("%.4g") " |"
}
function rate_cell(part, name, who, P, factor, unit, format) {
    rate(part, name "|" who "|" P, factor); figure(part, name, who, P, unit)
    return " " spread(format) " |"
}
function ratio_cell(part, name, who, other, P) {
    ratio(part, name "|" who "|" P, name "|" other "|" P); figure(part, name, who "/" other, P, "ratio")
    return " " spread("%.2f") " |"
}
function next_threads(P) { return P < all ? all : all + 1 } # 1, all

# ---- The parts
function ceilings(  i, P, line, list) {
    title("Ceilings")
    line = "| |"
    for (P = 1; P <= all; P = next_threads(P)) line = line " " threads_of(P) " |"
    say(line "\n|---|---|" (all > 1 ? "---|" : ""))
    split("fma copy read", list, " ")
    label["fma"] = "multiply-adds in registers, GFLOP/s"; label["copy"] = "copy (read + write), GB/s"
    label["read"] = "read, GB/s"
    for (i = 1; i <= 3; i++) {
        line = "| " label[list[i]] " |"
        for (P = 1; P <= all; P = next_threads(P))
            line = line rate_cell("ceilings", list[i], "ceiling", P, work["ceilings", list[i] "|ceiling|" P] / 1e9,
                i == 1 ? "GFLOP/s" : "GB/s", "%.1f")
        say(line)
    }
}

# Geometric mean over all products whose name ends in `kind` ("": all), round by round.
function sgemm_mean(kind, P,  i, k, count, list, f, sum, terms, a, b) {
    count = split(names["sgemm"], list, " ")
    begin()
    for (i = 1; i <= rounds; i++) {
        sum = terms = 0
        for (k = 1; k <= count; k++) {
            split(list[k], f, "/")
            a = list[k] "|ours|" P; b = list[k] "|openblas|" P
            if ((kind == "" || f[4] == kind) && ("sgemm", a, i) in ms && ("sgemm", b, i) in ms) {
                sum += log(ms["sgemm", b, i] / ms["sgemm", a, i]); terms++
            }
        }
        if (terms) put(exp(sum / terms))
    }
    return figure("sgemm", kind ? kind : "all", "ours/openblas, geometric mean", P, "ratio")
}
function sgemm(  count, list, i, P, line, kinds, flops) {
    title("sgemm, GFLOP/s; OpenBLAS: " (info["openblas"] ? info["openblas"] : "not measured"))
    line = "| config/M/layer/product |"
    for (P = 1; P <= all; P = next_threads(P)) line = line " " threads_of(P) ": ours | OpenBLAS | ours/OpenBLAS |"
    say(line "\n|---|---|---|---|" (all > 1 ? "---|---|---|" : ""))
    count = split(names["sgemm"], list, " ")
    for (i = 1; i <= count; i++) {
        line = "| " list[i] " |"
        for (P = 1; P <= all; P = next_threads(P)) {
            flops = work["sgemm", list[i] "|ours|" P] / 1e9
            rate_cell("sgemm", list[i], "ours", P, flops, "GFLOP/s"); line = line " " shown("%.1f") " |"
            rate_cell("sgemm", list[i], "openblas", P, flops, "GFLOP/s"); line = line " " shown("%.1f") " |"
            line = line ratio_cell("sgemm", list[i], "ours", "openblas", P)
        }
        say(line)
    }
    split("forward dX dW", kinds, " ")
    for (i = 1; i <= 4; i++) {
        line = "| geometric mean, " (i < 4 ? kinds[i] : "all") " |"
        for (P = 1; P <= all; P = next_threads(P)) {
            sgemm_mean(i < 4 ? kinds[i] : "", P)
            line = line " | | " spread("%.3f") " |"
            if (i == 4 && n) reached["sgemm", P] = med
        }
        say(line)
    }
    if (errors)
        say("\nLargest relative difference from OpenBLAS: " worst " (" worst_of ")" (worst <= 1e-5 ? "" : ": WRONG"))
}

function steps(  count, list, i, name, tokens, line) {
    title("Training steps, all threads; PyTorch: " info["pytorch"] (info["AdamW"] ? ", " info["AdamW"] : ""))
    say("| config/BxT | ms | tokens/s | GFLOP/s (6 parameters tokens) | PyTorch's ms | ours/PyTorch |")
    say("|---|---|---|---|---|---|")
    count = split(names["step"], list, " ")
    for (i = 1; i <= count; i++) {
        name = list[i]; tokens = work["step", name "|ours|"]
        line = "| " name " |" time_cell("step", name, "ours") \
            rate_cell("step", name, "ours", "", tokens, "tokens/s", "%.0f") \
            rate_cell("step", name, "ours", "", 6e-9 * parameters[name] * tokens, "GFLOP/s", "%.1f") \
            time_cell("step", name, "pytorch") ratio_cell("step", name, "ours", "pytorch")
        if (n) reached["step", name] = med
        say(line)
    }
    for (i = 1; i <= count; i++) breakdown(list[i])
}
function breakdown(name,  count, list, j, i, t) {
    title("Where the time of a step goes: " name)
    say("| operator | ms | share of the step |\n|---|---|---|")
    count = split(operators[name], list, " ")
    for (i = 1; i <= rounds; i++) {
        sum["outside operators", i] = sum["not products", i] = whole = ms["breakdown", name "|all|", i]
        sum["products", i] = 0
        for (j = 1; j <= count; j++) {
            if (list[j] == "all") continue
            t = ms["breakdown", name "|" list[j] "|", i]
            sum["outside operators", i] -= t
            if (product[list[j]] == 1) { sum["products", i] += t; sum["not products", i] -= t }
        }
    }
    for (j = 1; j <= count; j++) if (list[j] != "all") breakdown_row(name, list[j], product[list[j]] ? "product" : "")
    breakdown_row(name, "outside operators"); breakdown_row(name, "products"); breakdown_row(name, "not products")
    reached["rest", name] = med
    begin(); for (i = 1; i <= rounds; i++) put(ms["breakdown", name "|all|", i] / ms["step", name "|ours|", i])
    figure("breakdown", name, "with stopwatches/without", 0, "ratio")
    say("\nWith stopwatches the step took " spread("%.3f") " times as long as without.")
}
function breakdown_row(name, op, remark,  i, t, line) {
    for (i = 1; i <= rounds; i++) t[i] = (op, i) in sum ? sum[op, i] : ms["breakdown", name "|" op "|", i]
    begin(); for (i = 1; i <= rounds; i++) put(t[i])
    figure("breakdown", name, op, 0, "ms"); line = spread("%.4g")
    begin(); for (i = 1; i <= rounds; i++) put(100 * t[i] / ms["breakdown", name "|all|", i])
    figure("breakdown", name, op, 0, "percent")
    say("| " op (remark ? " (" remark ")" : "") " | " line " | " spread("%.1f%%") " |")
}

function attention(  count, list, i, P, line) {
    title("Attention, forward and backward, ms")
    say("| T | threads | ours | PyTorch fused | PyTorch math | ours/fused | ours/math |\n|---|---|---|---|---|---|---|")
    count = split(names["attention"], list, " ")
    for (i = 1; i <= count; i++)
        for (P = 1; P <= all; P = next_threads(P)) {
            line = "| " list[i] " | " P " |" time_cell("attention", list[i], "ours", P) \
                time_cell("attention", list[i], "fused", P) time_cell("attention", list[i], "math", P)
            line = line ratio_cell("attention", list[i], "ours", "fused", P)
            if (n) reached["attention", list[i], "fused", P] = med
            line = line ratio_cell("attention", list[i], "ours", "math", P)
            if (n) reached["attention", list[i], "math", P] = med
            say(line)
        }
}

function generation(  count, list, i, j, bytes, key, read, line) {
    title("Generation, batch 1, with a cache")
    say("| config | tokens/s | GB/s of weights | share of the read ceiling |\n|---|---|---|---|")
    count = split(names["generate"], list, " ")
    for (i = 1; i <= count; i++) {
        key = list[i] "|ours|"; read = "read|ceiling|" all; bytes = work["generate", key]
        if (!bytes) continue # a ceiling
        line = "| " list[i] " |" rate_cell("generate", list[i], "ours", "", 1, "tokens/s", "%.1f") \
            rate_cell("generate", list[i], "ours", "", bytes / 1e9, "GB/s", "%.1f")
        begin()
        for (j = 1; j <= rounds; j++)
            put(bytes / ms["generate", key, j] / work["generate", read] * ms["generate", read, j])
        reached["generate", list[i]] = figure("generate", list[i], "ours/read ceiling", 0, "ratio")
        say(line " " spread("%.2f") " |")
    }
}

# Layouts beside one rank of the same model: config/heads_H/tpT_ppP_dpD.
function layouts(  count, list, i, f, one, line) {
    title("Layouts, 4 sequences of 64 tokens a step; one rank has all threads")
    say("| config/heads/layout | tokens/s | of one rank's |\n|---|---|---|")
    count = split(names["layouts"], list, " ")
    for (i = 1; i <= count; i++) {
        split(list[i], f, "/"); one = f[1] "/" f[2] "/tp1_pp1_dp1"
        line = "| " list[i] " |" \
            rate_cell("layouts", list[i], "ours", "", work["layouts", list[i] "|ours|"], "tokens/s", "%.0f")
        ratio("layouts", list[i] "|ours|", one "|ours|")
        reached["layouts", f[1], f[3]] = figure("layouts", list[i], "layout/one rank", 0, "ratio")
        say(line " " spread("%.3f") " |")
    }
}

function memory_part(  part) {
    title("Memory of a training run, " memory_of)
    part = 100 * (memory["peak"] / memory["plan"] - 1)
    begin(); put(memory["peak"]); figure("memory", memory_of, "peak", 0, "bytes")
    begin(); put(memory["plan"]); figure("memory", memory_of, "plan", 0, "bytes")
    begin(); put(part); figure("memory", memory_of, "peak over plan", 0, "percent")
    say(sprintf("peak %.0f bytes, plan says %.0f: %+.2f%%", memory["peak"], memory["plan"], part))
    reached["memory"] = part < 0 ? -part : part
}

function against(  count, list, i) {
    title("Beside " info["against"])
    say("| config/BxT | ours, ms | the other, ms | ours/other |\n|---|---|---|---|")
    count = split(names["against"], list, " ")
    for (i = 1; i <= count; i++)
        say("| " list[i] " |" time_cell("against", list[i], "ours") time_cell("against", list[i], "other") \
            ratio_cell("against", list[i], "ours", "other"))
}

# ---- Goals. sign: 1, at least; -1, at most. why: the reason if there is no value.
function goal(text, bound, sign, value, why,  met) {
    met = value == "" ? "null" : sign * value >= sign * bound ? "true" : "false"
    goals = goals sprintf("%s{\"work\": %s, \"goal\": %s, \"at\": \"%s\", \"reached\": %s, \"met\": %s, " \
        "\"why_not\": %s}", goals ? ",\n  " : "", quoted(text), bound, sign > 0 ? "least" : "most",
        value == "" ? "null" : sprintf("%.4g", value), met, value == "" ? quoted(why) : "null")
    say("| " text " | " (sign > 0 ? ">= " : "<= ") bound " | " \
        (value == "" ? "not measured: " why : sprintf("%.3g", value)) " | " \
        (met == "true" ? "met" : met == "false" ? "NOT MET" : "") " |")
}
function goal_of(part, text, bound, sign, value, why) {
    goal(text, bound, sign, value, names[part] ? why : "this part did not run")
}
function all_goals(  P, torch) {
    title("Goals")
    say("| work | goal | reached | |\n|---|---|---|---|")
    torch = info["pytorch"] == "none" ? "PYTHON has no PyTorch" : "other sizes"
    for (P = 1; P <= all; P = next_threads(P))
        goal_of("sgemm", "sgemm, geometric mean / OpenBLAS, " threads_of(P), info["compiler"] ~ /^clang/ ? 0.9 : 1, 1,
            reached["sgemm", P], "no OpenBLAS")
    goal_of("step", "124M step, B=4 T=64 / PyTorch", 1.2, 1, reached["step", "124M/4x64"], torch)
    goal_of("step", "124M step, B=1 T=1024 / PyTorch", 1.2, 1, reached["step", "124M/1x1024"], torch)
    goal("124M step, B=4 T=64 / llm.c", 5, 1, "", "cpu.sh --against")
    goal("124M step, B=1 T=1024 / llm.c", 8, 1, "", "cpu.sh --against")
    goal_of("step", "outside products, T=64, % of a step", 15, -1, reached["rest", "124M/4x64"], "other sizes")
    goal_of("step", "outside products, T=1024, % of a step", 25, -1, reached["rest", "124M/1x1024"], "other sizes")
    for (P = 1; P <= all; P = next_threads(P)) {
        goal_of("attention", "attention, T=1024 / PyTorch's math, " threads_of(P), 2.5, 1,
            reached["attention", 1024, "math", P], torch)
        goal_of("attention", "attention, T=1024 / PyTorch's fused, " threads_of(P), 1, 1,
            reached["attention", 1024, "fused", P], torch)
    }
    goal_of("layouts", "tp=2 / one rank", 0.95, 1, reached["layouts", "124M", "tp2_pp1_dp1"], "other sizes")
    goal_of("layouts", "tp=8 / one rank", 0.7, 1, reached["layouts", "124M", "tp8_pp1_dp1"], "other sizes")
    goal_of("generate", "generation, 124M / read ceiling", 0.8, 1, reached["generate", "124M"], "other sizes")
    goal("peak memory, % from plan", 2, -1, reached["memory"], "this part did not run")
}

END {
    if (!all) all = info["threads"]
    say(info["machine"] "; load " info["load"] "; " info["compiler"] "; " threads_of(info["threads"]) \
        "; median of " rounds " rounds (smallest..largest)")
    if (names["ceilings"]) ceilings()
    if (names["sgemm"]) sgemm()
    if (names["step"]) steps()
    if (names["attention"]) attention()
    if (names["generate"]) generation()
    if (names["layouts"]) layouts()
    if ("peak" in memory) memory_part()
    if (names["against"]) against()
    else all_goals()
    for (i = 1; i <= notes; i++) say((i == 1 ? "\nNotes\n\n" : "") "- " note[i])
    if (!json) exit
    printf "{\"machine\": %s, \"load\": %s, \"compiler\": %s, \"threads\": %d, \"rounds\": %d, \"openblas\": %s, " \
        "\"pytorch\": %s, \"sgemm_error\": %s,\n \"figures\": [\n  ", quoted(info["machine"]), quoted(info["load"]),
        quoted(info["compiler"]), info["threads"], rounds, quoted(info["openblas"]), quoted(info["pytorch"]),
        errors ? json_value(worst) : "null"
    print figures "],\n \"goals\": [\n  " goals "],"
    printf " \"notes\": ["
    for (i = 1; i <= notes; i++) printf "%s%s", (i > 1 ? ", " : ""), quoted(note[i])
    print "]}"
}
