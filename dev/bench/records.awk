# records.awk - what gpu_table.awk and cpu_table.awk share: records are lines of name=value pairs.

function number(x) { return x ~ /^-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?$/ }
function quoted(x) { gsub(/[\\"]/, "'", x); return "\"" x "\"" }
function json_value(x) { return number(x) ? x : quoted(x) }
function percent(a, b) { return a > 0 && b > 0 ? sprintf("%.1f%%", 100 * a / b) : "-" }

# r[name] = value of this line's pairs, and `line`, the same in JSON.
function parse_record(  i, at, name, text) {
    line = ""
    split("", r)
    for (i = 1; i <= NF; i++) {
        at = index($i, "=")
        name = substr($i, 1, at - 1)
        text = substr($i, at + 1)
        r[name] = number(text) ? text + 0 : text
        line = line (i > 1 ? ", " : "") "\"" name "\": " json_value(text)
    }
}
