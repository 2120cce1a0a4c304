"""How a comparison of many models ends: its table into the documentation, what failed, an exit code."""


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
