"""Stream a reply from a running server, stop it half-way, and show what streaming cost.

python -m mlx_streamexperts.server &
python examples/server_client.py "In the beginning God created the heaven and the earth. And"

Needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.request

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--stop-after", type=int, help="leave after so many pieces of text")
    args = parser.parse_args()

    key = os.environ.get("STREAMEXPERTS_API_KEY", "none")
    client = openai.OpenAI(base_url=args.url + "/v1", api_key=key)
    print("Models:", ", ".join(m.id for m in client.models.list()))
    stream = client.completions.create(
        model="default_model", prompt=args.prompt, max_tokens=args.max_tokens, stream=True
    )
    for i, piece in enumerate(stream, 1):
        print(piece.choices[0].text, end="", flush=True)
        if i == args.stop_after:
            stream.close()  # the server stops generating, and reading
            break
    print()

    request = urllib.request.Request(
        args.url + "/live.json", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request) as answer:
        figures = json.load(answer)
    experts = figures["experts"]
    print(
        f"{experts['hit_rate']:.1%} of needed experts were resident, "
        f"{experts['read']['bytes'] / 1e6:.1f} MB read, "
        f"{figures['memory']['peak'] / 1e6:.1f} MB of memory at most"
    )


if __name__ == "__main__":
    main()
