"""One command, one module: its settings and its function, and nothing that another command needs.

A command may use every room and both model packages, but no other command.
"""
