"""The catalogue of public data sets: sizes, propensity constants, citations and download pages.

Sizes are from the tables of the Extreme Classification Repository
(http://manikvarma.org/downloads/XC/XMLRepository.html), from ViXML (arXiv 2511.13189) for
MM-AmazonTitles-300K, and from PECOS for EURLex-4K. The propensity constants are the repository's
(Jain et al., KDD 2016): A, B = 0.5, 0.4 for Wikipedia, 0.6, 2.6 for Amazon, else 0.55, 1.5.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vixml_jax.data import prepare_line
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources import published, tfds_records, xml_repository
from vixml_jax.data.sources.published import LABELS, PublicDataset
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, file_stats
from vixml_jax.errors import InputError

# A and B for data that are not in the catalogue: the values of most data sets in the paper.
DEFAULT_PROPENSITY = (0.6, 2.6)
_REPOSITORY = "http://manikvarma.org/downloads/XC/XMLRepository.html"
_BHATIA = """@misc{Bhatia16,
  author = {Bhatia, K. and Dahiya, K. and Jain, H. and Kar, P. and Mittal, A. and Prabhu, Y. and
    Varma, M.},
  title = {The extreme classification repository: Multi-label datasets and code},
  url = {http://manikvarma.org/downloads/XC/XMLRepository.html},
  year = {2016}
}"""
_VIXML = """@article{Ortego25,
  author = {Ortego, D. and Rodríguez, M. and Almagro, M. and Dahiya, K. and Jiménez, D. and
    SanMiguel, J. C.},
  title = {Large Language Models Meet Extreme Multi-label Classification: Scaling and Multi-modal
    Framework},
  journal = {arXiv:2511.13189},
  year = {2025}
}"""
_MUFIN = """@inproceedings{Mittal22,
  author = {Mittal, A. and Dahiya, K. and Malani, S. and Ramaswamy, J. and Kuruvilla, S. and
    Ajmera, J. and Chang, K. and Agarwal, S. and Kar, P. and Varma, M.},
  title = {Multi-Modal Extreme Classification},
  booktitle = {CVPR},
  pages = {12393--12402},
  year = {2022}
}"""
_EURLEX = """@inproceedings{LozaMencia08,
  author = {Loza Menc{\\'i}a, E. and F{\\"u}rnkranz, J.},
  title = {Efficient Pairwise Multilabel Classification for Large-Scale Problems in the Legal
    Domain},
  booktitle = {ECML PKDD},
  pages = {50--65},
  year = {2008}
}"""
_PECOS = """@article{Yu22,
  author = {Yu, H.-F. and Zhong, K. and Zhang, J. and Chang, W.-C. and Dhillon, I. S.},
  title = {PECOS: Prediction for Enormous and Correlated Output Spaces},
  journal = {Journal of Machine Learning Research},
  year = {2022}
}"""
_IMAGES = ("_image_embeddings.npy", "_has_image.npy", "_images.txt", "_map.npy")
_CITED = "No licence is stated with the files; the repository asks to be cited."
_TITLE, _BOTH = ("title",), ("title", "content")
_AMAZON, _WIKIPEDIA, _OTHER = (0.6, 2.6), (0.5, 0.4), (0.55, 1.5)


def _of_repository(
    name: str,
    sizes: tuple[int, int, int],
    propensity: tuple[float, float],
    *,
    more: str = "",
    max_tokens: int = 128,
    layouts: tuple[published.Layout, ...] = (published.JSON,),
) -> PublicDataset:
    """A data set of the XML repository.

    Args:
      name: Its name; if it contains 'Titles', texts are titles only.
      sizes: Numbers of training queries, labels and test queries.
      propensity: Constants A and B.
      more: Further citations.
      max_tokens: Tokens of a text with content; titles are cut to 32.
      layouts: File names of its releases.
    """
    titles = "Titles" in name
    return PublicDataset(
        key=name.lower().replace("-", "_"),
        name=name,
        train=sizes[0],
        labels=sizes[1],
        test=sizes[2],
        fields=_TITLE if titles else _BOTH,
        max_tokens=32 if titles else max_tokens,
        propensity_a=propensity[0],
        propensity_b=propensity[1],
        citation="\n".join(part for part in (_BHATIA, more) if part),
        homepage=_REPOSITORY,
        download=f"the raw text of {name}",
        licence=_CITED,
        layouts=layouts,
    )


_AMAZON_131K = (294_805, 131_073, 134_835)
_SEE_ALSO_320K = (693_082, 312_330, 177_515)
_WIKI_500K = (1_813_391, 501_070, 783_743)
_DATASETS = (
    _of_repository("LF-AmazonTitles-131K", _AMAZON_131K, _AMAZON, more=_VIXML),
    _of_repository("LF-Amazon-131K", _AMAZON_131K, _AMAZON, more=_VIXML),
    _of_repository(
        "MM-AmazonTitles-300K",
        (586_781, 303_296, 260_536),
        _AMAZON,
        more=f"{_MUFIN}\n{_VIXML}",
        layouts=(published.MUFIN, published.JSON),
    ),
    _of_repository("LF-AmazonTitles-1.3M", (2_248_619, 1_305_265, 970_237), _AMAZON, more=_VIXML),
    _of_repository("LF-WikiSeeAlso-320K", _SEE_ALSO_320K, _OTHER),
    _of_repository("LF-WikiSeeAlsoTitles-320K", _SEE_ALSO_320K, _OTHER),
    _of_repository("LF-Wikipedia-500K", _WIKI_500K, _WIKIPEDIA, max_tokens=256),
    _of_repository("LF-WikiTitles-500K", _WIKI_500K, _WIKIPEDIA),
    PublicDataset(
        key="eurlex_4k",
        name="EURLex-4K",
        train=15_449,
        labels=3_956,
        test=3_865,
        fields=_TITLE,
        max_tokens=128,
        propensity_a=_OTHER[0],
        propensity_b=_OTHER[1],
        citation=f"{_EURLEX}\n{_PECOS}",
        homepage="https://archive.org/download/pecos-dataset/xmc-base/eurlex-4k.tar.gz",
        download="the archive",
        licence="No licence is stated with the archive; the texts are of EUR-Lex.",
        layouts=(published.PECOS,),
    ),
)
CATALOG: dict[str, PublicDataset] = {dataset.key: dataset for dataset in _DATASETS}


def is_named(source: str) -> bool:
    """Whether a source is a data set of the catalogue; an existing path takes precedence."""
    return source in CATALOG and not os.path.exists(source)


class Recognised(NamedTuple):
    """A data set of the catalogue that a source is, under whatever path.

    Attributes:
      dataset: The data set.
      by: What it was recognised by, for messages.
    """

    dataset: PublicDataset
    by: str


def recognise(source: str, sizes: Mapping[str, int] | None = None) -> Recognised | None:
    """The data set of the catalogue that a source is; None: it is none of them.

    Args:
      source: Name or path. The name of the file or directory, or of the one that it is in, may have
        other separators and a longer end than that of the data set: `LF_WikiSeeAlso-320K.raw`.
      sizes: Numbers of items of 'train', 'labels' and, if the source has it, 'test'. Data with the
        published sizes are recognised under any name.
    """
    if is_named(source):
        return Recognised(CATALOG[source], "name")
    path = os.path.abspath(source)
    for name in (os.path.basename(path), os.path.basename(os.path.dirname(path))):
        for dataset in CATALOG.values():
            if _plain(name).startswith(_plain(dataset.key)):
                differ = ", although its sizes differ" if _sizes_differ(dataset, sizes) else ""
                return Recognised(dataset, f"the name {name}{differ}")
    for dataset in CATALOG.values():
        if sizes and not _sizes_differ(dataset, sizes):
            return Recognised(dataset, f"its sizes, such as {dataset.labels:,} labels")
    return None


def _sizes_differ(dataset: PublicDataset, sizes: Mapping[str, int] | None) -> bool:
    """Whether sizes are not those of a data set; of a split that is not given, nothing is known."""
    given = {} if sizes is None else sizes
    return any(count != getattr(dataset, part) for part, count in given.items())


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]+", "", name.lower())


class Propensity(NamedTuple):
    """Constants of the inverse propensities of a data set.

    Attributes:
      a, b: The constants A and B.
      origin: Where they are from, for messages.
    """

    a: float
    b: float
    origin: str

    def __str__(self) -> str:
        return f"A {self.a:g}, B {self.b:g} ({self.origin})"


def propensity(source: str, sizes: Mapping[str, int] | None = None) -> Propensity:
    """The constants A and B of a source: see `recognise`; the usual ones if it is not public."""
    found = recognise(source, sizes)
    if found is None:
        return Propensity(*DEFAULT_PROPENSITY, "the default; no data set of the catalogue")
    dataset = found.dataset
    origin = f"{dataset.name}, recognised by {found.by}"
    return Propensity(dataset.propensity_a, dataset.propensity_b, origin)


def how_to_get(dataset: PublicDataset, path: str, tokenizer: str) -> str:
    """What to do to have a data set prepared in `path`, for messages."""
    raw = f"RAW/{dataset.name}"
    settings: dict[str, Any] = {"max_tokens": dataset.max_tokens}
    line = prepare_line.first(raw, path, **settings, tokenizer=tokenizer)
    return (
        f"this is {dataset.name} ({dataset.key} in prepare --catalog): download {dataset.download} "
        f"from {dataset.homepage}, unpack it to {raw} and run: {line}"
    )


def builder(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Any:
    """The TFDS builder of a data set of the catalogue; see `tfds_records.builder`.

    Raises:
      InputError: If there is no such data set.
    """
    return tfds_records.builder(_look_up(name), data_dir=data_dir, manual_dir=manual_dir)


def _look_up(name: str) -> PublicDataset:
    if name not in CATALOG:
        raise InputError(
            f"{name!r}: not a data set of the catalogue; expected one of {', '.join(CATALOG)}"
        )
    return CATALOG[name]


def read(
    name: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    find_images: xml_repository.FindImages = image_embeddings.read_images,
) -> RawDataset:
    """Reads a data set of the catalogue; the first time, builds it from its published files.

    Args:
      name: Name in the catalogue.
      data_dir, manual_dir: See `tfds_records.builder`.
      find_images: Finds the images of files with the prefixes trn, tst and lbl in `manual_dir`; by
        default embeddings.

    Raises:
      InputError: If there is no such data set, or its files are missing or not as published.
    """
    maker = builder(name, data_dir=data_dir, manual_dir=manual_dir)
    tfds_records.build(maker)
    dataset = maker.dataset
    parts = {part: tfds_records.open_part(maker, part) for part in dataset.sizes}
    items = {
        part_name: RawItems(
            dataset.sizes[part_name],
            part.read_texts,
            find_images(
                maker.manual_dir, xml_repository.PREFIX[part_name], dataset.sizes[part_name]
            ),
            part.ids,
        )
        for part_name, part in parts.items()
    }
    image_embeddings.check_widths(
        {name: part_items.images for name, part_items in items.items()}, maker.manual_dir
    )
    queries = {
        split: RawQueries(
            items[split], parts[split].relevance, filter=tfds_records.filter_of(maker, split)
        )
        for split in ("train", "test")
    }
    file_names = os.listdir(maker.manual_dir) if os.path.isdir(maker.manual_dir) else []
    image_paths = [
        os.path.join(maker.manual_dir, file_name)
        for file_name in file_names
        if file_name.endswith(_IMAGES)
    ]
    return RawDataset(
        name=dataset.name,
        fingerprint={
            "path": name,
            "files": tfds_records.sources(maker),
            "images": file_stats(image_paths),
        },
        labels=items[LABELS],
        summary=(
            f"{dataset.name} from {dataset.homepage}\n"
            f"  {'build':9} {maker.data_dir}\n"
            f"  {'text':9} {' and '.join(dataset.fields)}",
            f"Please cite:\n{dataset.citation}",
        ),
        **queries,
    )


def table() -> str:
    """The catalogue as an aligned table, one line per data set."""
    lines = [
        f"{'--source':26} {'train':>9} {'labels':>9} {'test':>9} {'A':>5} {'B':>4}  {'text':15}  "
        "download page"
    ]
    for dataset in CATALOG.values():
        lines.append(
            f"{dataset.key:26} {dataset.train:>9,} {dataset.labels:>9,} {dataset.test:>9,} "
            f"{dataset.propensity_a:>5} {dataset.propensity_b:>4}  "
            f"{' + '.join(dataset.fields):15}  {dataset.homepage}"
        )
    return "\n".join(lines)
