"""Connection strings as people paste them: from a command, a file, a chat, or as settings."""
