"""The catalogue of public data sets: sizes, propensity constants, citations and download pages.

Sizes are from the tables of the Extreme Classification Repository
(http://manikvarma.org/downloads/XC/XMLRepository.html), from ViXML (arXiv 2511.13189) for
MM-AmazonTitles-300K, and from PECOS for EURLex-4K. The propensity constants are the repository's
(Jain et al., KDD 2016): A, B = 0.5, 0.4 for Wikipedia, 0.6, 2.6 for Amazon, else 0.55, 1.5.
"""

import os
from typing import Any

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
    layouts: tuple[published.Layout, ...] = (published.JSON,),
) -> PublicDataset:
    """A data set of the XML repository.

    Args:
      name: Its name; if it contains 'Titles', texts are titles only.
      sizes: Numbers of training queries, labels and test queries.
      propensity: Constants A and B.
      more: Further citations.
      layouts: File names of its releases.
    """
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
    """Whether a source is a data set of the catalogue; an existing path takes precedence."""
    return source in CATALOG and not os.path.exists(source)


def propensity(source: str) -> tuple[float, float]:
    """The default constants A and B of the inverse propensities of a source."""
    if not is_named(source):
        return DEFAULT_PROPENSITY
    return CATALOG[source].propensity_a, CATALOG[source].propensity_b


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
