"""`lightning completion bash|zsh`: print the script that completes command lines in a shell.

The script calls `lightning completion words LINE`, which prints the words that may come next.
"""

import sys

from ravine.errors import UsageError

from ..discovery.completion import complete_line
from ..error_report import program_name, unknown_name_error

BASH_SCRIPT = """\
# Completion of lightning and ravine: eval "$({0} completion bash)"
_ravine_complete() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" word="${{COMP_WORDS[COMP_CWORD]}}" IFS=$'\\n'
    local typed="${{line##*[[:space:]]}}"
    # bash splits words at = and :, and replaces only what follows the last of them
    case "$word" in "=" | ":" | "+=") word="" ;; esac
    local before="${{typed%"$word"}}"
    COMPREPLY=($("$1" completion words "$line" 2>/dev/null))
    COMPREPLY=("${{COMPREPLY[@]#"$before"}}")
    case "${{COMPREPLY[0]}}" in *= | *. | */) compopt -o nospace ;; esac
}}
complete -F _ravine_complete lightning ravine
"""
ZSH_SCRIPT = """\
# Completion of lightning and ravine: eval "$({0} completion zsh)"
_ravine_complete() {{
    local -a all open closed
    local line="${{(j: :)words[1,CURRENT-1]}} $PREFIX"
    all=("${{(@f)$("$words[1]" completion words "$line" 2>/dev/null)}}")
    open=(${{(M)all:#*[=./]}})
    closed=(${{all:#*[=./]}})
    (( $#open )) && compadd -Q -S '' -- $open
    (( $#closed )) && compadd -Q -- $closed
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef _ravine_complete lightning ravine
"""
SCRIPTS = {"bash": BASH_SCRIPT, "zsh": ZSH_SCRIPT}


def run_argv(argv: list[str]) -> int:
    """Print the script of a shell, or the words that complete a line.

    Args:
        argv: "completion", then the name of a shell; or "words" and the line up to the cursor, as
            the script of a shell passes it.
    """
    from .. import main  # the table of commands; main imports this module

    words = argv[1:]
    if len(words) == 2 and words[0] == "words":
        commands = (*main.COMMANDS, *main.LOOKUP_COMMANDS)
        # the words that may replace the last one of the line
        sys.stdout.write("".join(f"{word}\n" for word in complete_line(words[1], commands)))
        return 0
    # SCRIPTS: by shell, the text that makes it call this command for completions
    if len(words) == 1 and words[0] in SCRIPTS:
        sys.stdout.write(SCRIPTS[words[0]].format(program_name()))
        return 0
    program = program_name()
    if not words:
        raise UsageError("completion needs a shell", SCRIPTS, flag=f"{program} completion bash")
    if words[0] in SCRIPTS:
        raise UsageError(
            f"completion takes one shell, but {' '.join(words[1:])!r} was also given",
            flag=f"{program} completion {words[0]}",
        )
    # makes the error, with the nearest shell in the suggested command, or bash
    raise unknown_name_error(
        f"there is no completion for {words[0]!r}",
        words[0],
        SCRIPTS,
        f"{program} completion {{}}".format,
        "bash",
    )
