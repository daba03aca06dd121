"""Options and functions of the commands, by subject; `cli.py` lists them."""
