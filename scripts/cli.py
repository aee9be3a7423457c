"""`afferent <command> ...`: names the commands and hands over to their doors."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "run an experiment from its configuration (without one: list them all)",
    "reproduce": "re-run a paper's claims and judge them",
    "report": "write the page of a run or of a paper",
    "bench": "measure speed, as ratios in one run",
    "synthesise": "let a model study a text, for a cartridge of it",
    "answer": "ask a cartridge",
    "play": "act in a world that a model dreams",
    "serve": "an OpenAI-compatible server for one model",
}

HELP = """afferent: executable claims about models that keep learning and models of the world

usage: afferent <command> [...]

commands:
{commands}

examples:
  afferent train experiment=quickstart/stdlib             train from a configuration
  afferent train experiment=quickstart/stdlib optim.lr=3e-3 seed=1
  afferent train experiment=quickstart/stdlib --dry-run   what it would do and cost
  afferent train experiment=quickstart/stdlib sweep=seeds launcher=joblib
  afferent reproduce paper=quickstart scale=cpu           re-run and judge its claims

`afferent <command> --help` says more. The same train command again resumes, or shows the results.
"""


def main() -> None:
    """Entry point of the console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        lines = [f"  {name:<11} {about}" for name, about in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"afferent: there is no command `{command}`.{hint} Use: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [f"afferent {command}", *sys.argv[2:]]
    importlib.import_module(f"scripts.{command}").main()


if __name__ == "__main__":
    main()
