"""The command line: one module per verb, each of them only parses, calls and prints.

A verb module ``cli/<verb>.py`` has these names:

- ``EXAMPLE``: command lines shown at the end of its ``--help`` (each is run by a test);
- ``add_arguments(parser)``: declares its arguments on a ``jsonargparse.ArgumentParser``;
- ``parse(parser, argv) -> Namespace``, only where the parser's own ``parse_args`` does not fit;
- ``run(arguments) -> int``: does the work through the rooms below and returns the exit code.

Its one-line summary stands in ``cli.main.VERBS``. Verb modules import torch and the other heavy
packages inside ``run``, never at the top: ``--help`` must answer in under half a second.
"""
