"""Connection strings as people paste them: in a command, a file, a chat, or in their parts.

Standard library only, for Python 3.10 on: the generator's hook runs these files too.
"""
