"""Connection strings as people paste them: in a command, a file, a chat, or in their parts."""
