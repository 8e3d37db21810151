"""From a model folder to a model whose experts are streamed, or to a refusal by name."""
