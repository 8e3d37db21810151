"""From a model folder to a model whose experts are streamed.

The path of a load, in order:

1. `load` or a `patch` receives the call of mlx-lm's `load_model` (load.py, patching.py).
2. `resolve` turns a repository into a folder; `read_checkpoint` validates its headers
   (of mlx-vlm's models vlm.py does, as mlx-vlm opens each file).
3. `discover` lets mlx-lm build the model lazily (lazy_load.py) and ties every expert table to bytes
   on disk.
   Several machines do this together (on_ranks.py), each for its own layers.
4. `DiscoveredModel.plan` divides the memory budget: trunk, expert cache, KV cache, work space.
5. `check_device` refuses a plan that the machine cannot hold. Until here nothing was evaluated.
6. A `StreamedSwitch` takes the place of each expert module, and the trunk is read in.
7. `ExpertStream` opens the slots, the reader and the prefetcher for all layers.
8. `Passes` and `PassCheck` intercept forward passes: they keep to the plan and refuse bad input.
9. The caller gets mlx-lm's model; `stream(model)` returns its `ExpertStream`.
"""
