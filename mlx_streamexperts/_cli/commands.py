"""The commands of `streamexperts`: each is a module or package of that name with a `main`."""

COMMANDS = {
    "bench": "measure tokens/s: mlx_lm.benchmark with a memory budget",
    "chat": "talk to a model: mlx_lm.chat with a memory budget",
    "convert": "rewrite an original checkpoint once so that it can be streamed",
    "doctor": "check whether a model will run here, how fast, and what limits it",
    "generate": "generate text: mlx_lm.generate with a memory budget",
    "mirror": "copy a model's experts to a second drive, to read from both at once",
    "pack": "store each expert's parts side by side, so that a miss is one read",
    "quality": "measure what leaving experts out (--lossy) costs and brings on your text",
    "report": "measure how a model runs here and write a page and a JSON file",
    "run": "run any other mlx-lm program with its model streamed",
    "server": "serve models over HTTP: mlx_lm.server with a memory budget",
    "simulate": "replay recorded routing through other cache sizes and policies",
    "tune": "find the fastest settings for a model, this machine and your prompts",
}
"""What each command does, in one line."""
