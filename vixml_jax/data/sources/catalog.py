"""The named public data sets: sizes, propensities, citation, where they are from; read by name.

Sizes are those of the Extreme Classification Repository's tables
(http://manikvarma.org/downloads/XC/XMLRepository.html), of ViXML (arXiv 2511.13189) for
MM-AmazonTitles-300K, and of PECOS for EURLex-4K. Propensities are as the repository computes them
(Jain et al., KDD 2016): A, B = 0.5, 0.4 for Wikipedia, 0.6, 2.6 for Amazon, else 0.55, 1.5.
"""

import os
from typing import Any

from vixml_jax.data.images import image_files
from vixml_jax.data.sources import published, tfds_records, xml_repository
from vixml_jax.data.sources.published import LABELS, PublicDataset
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, describe_files
from vixml_jax.errors import InputError

DEFAULT_PROPENSITY = (0.6, 2.6)  # Of any other data: that of most of the paper's sets.
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
    layouts: tuple[published.Layout, ...] = (published.JSON,),
) -> PublicDataset:
    """A set of the repository, of train, labels and test items; those of titles say so."""
    return PublicDataset(
        key=name.lower().replace("-", "_"),
        name=name,
        train=sizes[0],
        labels=sizes[1],
        test=sizes[2],
        fields=_TITLE if "Titles" in name else _BOTH,
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
    _of_repository("LF-Wikipedia-500K", _WIKI_500K, _WIKIPEDIA),
    _of_repository("LF-WikiTitles-500K", _WIKI_500K, _WIKIPEDIA),
    PublicDataset(
        key="eurlex_4k",
        name="EURLex-4K",
        train=15_449,
        labels=3_956,
        test=3_865,
        fields=_TITLE,
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
    """Whether a source is a set of the catalogue; a path of that name goes first."""
    return source in CATALOG and not os.path.exists(source)


def propensity(source: str) -> tuple[float, float]:
    """A and B of inverse propensity, where the user does not say."""
    if not is_named(source):
        return DEFAULT_PROPENSITY
    return CATALOG[source].propensity_a, CATALOG[source].propensity_b


def builder(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Any:
    """The TFDS builder of a set of the catalogue; see `records.builder`.

    Raises:
      InputError: If there is no such set.
    """
    return tfds_records.builder(_look_up(name), data_dir=data_dir, manual_dir=manual_dir)


def _look_up(name: str) -> PublicDataset:
    if name not in CATALOG:
        raise InputError(f"{name!r}: not in the catalogue; expected one of {', '.join(CATALOG)}")
    return CATALOG[name]


def read(
    name: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    find_images: xml_repository.FindImages = image_files.read_images,
) -> RawDataset:
    """A set of the catalogue; the first time, it is built from the files downloaded by hand.

    Args:
      name: Of the catalogue.
      data_dir, manual_dir: See `records.builder`.
      find_images: Of the files trn, tst and lbl in `manual_dir`; embeddings if not told.

    Raises:
      InputError: If there is no such set, its files are missing, or they are not as published.
    """
    maker = builder(name, data_dir=data_dir, manual_dir=manual_dir)
    tfds_records.build(maker)
    dataset = maker.dataset
    parts = {part: tfds_records.open_part(maker, part) for part in dataset.sizes}
    items = {
        part: RawItems(
            dataset.sizes[part],
            found.read_texts,
            find_images(maker.manual_dir, xml_repository.PREFIX[part], dataset.sizes[part]),
            found.ids,
        )
        for part, found in parts.items()
    }
    image_files.check_widths(
        {part: found.images for part, found in items.items()}, maker.manual_dir
    )
    queries = {
        split: RawQueries(
            items[split], parts[split].relevance, filter=tfds_records.filter_of(maker, split)
        )
        for split in ("train", "test")
    }
    beside = os.listdir(maker.manual_dir) if os.path.isdir(maker.manual_dir) else []
    pictures = [os.path.join(maker.manual_dir, n) for n in beside if n.endswith(_IMAGES)]
    return RawDataset(
        name=dataset.name,
        fingerprint={
            "path": name,
            "files": tfds_records.sources(maker),
            "images": describe_files(pictures),
        },
        labels=items[LABELS],
        understood=(
            f"{dataset.name} of {dataset.homepage}, built in {maker.data_dir}",
            f"texts: {' and '.join(dataset.fields)}; cite:",
            *dataset.citation.split("\n"),
        ),
        **queries,
    )


def table() -> str:
    """The catalogue, a line a set."""
    lines = [f"{'--source':26} {'train':>9} {'labels':>9} {'test':>9}    A    B  text, from"]
    for dataset in CATALOG.values():
        lines.append(
            f"{dataset.key:26} {dataset.train:>9,} {dataset.labels:>9,} {dataset.test:>9,} "
            f"{dataset.propensity_a:4} {dataset.propensity_b:4}  {' + '.join(dataset.fields)}, "
            f"{dataset.homepage}"
        )
    return "\n".join(lines)
