"""Public datasets worth starting with, by domain: licence, size and how to prepare them.

Licences and sizes are those of the datasets' cards on the hub. A licence covers what its publisher owns; read the card
before you publish what was trained on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recommended:
    """A dataset on the hub.

    Attributes:
        domain: that it is of.
        name: on the hub.
        licence: as its card says.
        rows: of all its splits, as its card says.
        about: what is in it.
        options: of `nightpress dataset prepare` that it needs besides its name.
    """

    domain: str
    name: str
    licence: str
    rows: int
    about: str
    options: str = ""


RECOMMENDED = (
    Recommended("healthcare", "qiaojin/PubMedQA", "MIT", 1_000,
                "questions about abstracts of biomedical research, answered by experts",
                "--dataset-config pqa_labeled"),
    Recommended("healthcare", "openlifescienceai/medmcqa", "Apache-2.0", 193_155,
                "questions of medical entrance examinations; the explanation, where there is one, is the answer",
                "--map answer=exp --map label=subject_name"),
    Recommended("legal", "theatticusproject/cuad-qa", "CC-BY-4.0", 26_632,
                "clauses of 510 commercial contracts, found by lawyers; long rows",
                "--revision refs/convert/parquet --max-tokens 16384"),
    Recommended("legal", "coastalcph/lex_glue", "CC-BY-4.0", 80_000,
                "provisions of contracts and what each is about, 100 classes",
                "--dataset-config ledgar --map question=text --map answer=label"),
    Recommended("finance", "next-tat/tat-llm-instructions", "CC-BY-4.0", 36_691,
                "questions about tables and text of annual reports, worked out in steps"),
    Recommended("finance", "sujet-ai/Sujet-Finance-Instruct-177k", "Apache-2.0", 177_597,
                "a collection of 18 datasets: questions, sentiment, topics; look up the licences of its parts",
                "--map label=task_type"),
)


def recommend(domain: str | None = None) -> tuple[Recommended, ...]:
    """Return the datasets of a domain, or of all; none for a domain that has none."""
    return tuple(one for one in RECOMMENDED if domain in (None, one.domain))


def licence_of(name: str) -> str:
    """Return the licence of a recommended dataset, nothing for another."""
    return next((one.licence for one in RECOMMENDED if one.name == name), "")
