"""The commands of the command line, a module each; `edm2.cli` loads the one that is called.

`edm2 NAME` is `edm2.commands.NAME.run(prog, words)`, `edm2 NAME WORD` is `edm2.commands.NAME.WORD(prog, words)`.
"""
