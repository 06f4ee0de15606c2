"""The flags of the commands that open a run to answer queries, and the predictor they describe."""

from absl import flags

from vixml_jax import config as config_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.config import SearchConfig
from vixml_jax.runtime import compilation_cache
from vixml_jax.search import factory
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import object_store


def define() -> None:
    """Defines the flags, `--workdir` apart."""
    flags.DEFINE_enum(
        "image_dtype", "float32", ["float32", "bfloat16"], "Precision of the vision model."
    )
    flags.DEFINE_enum(
        "search",
        "auto",
        ["auto", "exact", "scann"],
        "Exact or approximate search of labels. 'auto': by the ScaNN index that evaluate "
        f"--search=scann built, if there is one of {factory.SCANN_FROM:,} labels or more, else "
        "exact.",
    )
    flags.DEFINE_string(
        "data",
        "",
        "Prepared data of the run, if they have moved. Read once, to write the serving artifacts.",
    )
    flags.DEFINE_string(
        "mesh", "", "Mesh, if not as in training. 'fsdp:-1' fits any number of devices."
    )
    settings_lib.define_flags()
    config_lib.define_group("search", SearchConfig)
    compilation_cache.define_flag()
    object_store.define_flag()


def search_config(values: flags.FlagValues) -> SearchConfig:
    """Returns the settings of the search."""
    return config_lib.group_from_flags("search", SearchConfig, values)


def load(values: flags.FlagValues, *, warm: bool) -> Predictor:
    """Opens the run of `--workdir`; see `Predictor.load`.

    Args:
      values: Parsed flags.
      warm: Whether to compile all programs now.
    """
    return Predictor.load(
        values.workdir,
        search=values.search,
        search_config=search_config(values),
        values=values,
        data=values.data,
        data_cache=values.data_cache,
        mesh=values.mesh,
        warm=warm,
    )
