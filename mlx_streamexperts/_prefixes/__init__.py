"""Prompts that are remembered. On the drive, in this order:

1. `states`: the KV caches of a model become parts (rows and snapshots of arrays), and back.
2. `entries`: files that hold parts, whole or not at all, within a number of bytes.
3. `remembered`: which prefix of a prompt is there, and what has to be written.

`shared` keeps prompts in memory instead, for the server: what they begin with alike is there once.

Nothing is written unless a folder is stated: this is the only part of the package that writes while
models run. What is damaged or another model's is computed again and never used.
"""
