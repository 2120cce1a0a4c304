"""How a comparison of many models ends: its outcomes beside earlier ones, its table into the documentation, what failed, an exit code."""

import json


def beside_earlier(path, rows, keys, tried):
    """`rows` behind those of earlier runs in the file at `path`, where one is named, which holds all of them then. What was `tried` is new."""
    if path:
        earlier = json.loads(path.read_text()) if path.exists() else []
        rows = [row for row in earlier if tuple(row[key] for key in keys) not in tried] + rows
        path.write_text(json.dumps(rows, indent=1))
    return rows


def end(options, marks, result, wrong, summary, say):
    """Writes `result` between the `marks` of the file `--docs` names, prints it, says what is wrong; the exit code."""
    if options.docs:
        text = options.docs.read_text()
        (before, rest), close = text.split(marks[0]), marks[1]
        options.docs.write_text(before + marks[0] + "\n" + result + "\n" + close + rest.split(close)[1])
    print(result)
    for line in wrong:
        say(f"FAILED {line}")
    say(summary)
    return 1 if wrong else 0
