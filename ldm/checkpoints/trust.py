"""Code outside `ldm` that a file of weights may ask for: what the user's own YAML names, and nothing else."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from ldm.checkpoints.description import targets_of
from ldm.checkpoints.originals.original_yaml import read_tree


def is_run_config(config: str | Path | Mapping) -> bool:
    """Whether this is the YAML of a training run, not that of another project; raises as `read_tree`."""
    tree, _ = read_tree(config)
    return "task" in tree or "base" in tree


def trusted_targets(config: str | Path | Mapping) -> frozenset[str]:
    """All targets in a training config and its sampler, in its base and its first stage's config; raises as
    `read_tree`.
    """
    tree, _ = read_tree(config)
    plain = OmegaConf.to_container(tree, resolve=False)
    found = frozenset(targets_of(plain))
    sampling = plain.get("sampling")
    if isinstance(sampling, Mapping) and isinstance(sampling.get("sampler"), str):
        found |= {sampling["sampler"]}
    if isinstance(config, str | Path) and isinstance(tree.get("base"), str):
        found |= trusted_targets(Path(config).parent / tree["base"])
    if isinstance(tree.get("first_stage_config"), str):
        found |= trusted_targets(tree["first_stage_config"])
    return found
