"""What is said of a method beside its code: paper, needs, terms, and what the code rests on. Read from the source, so without torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastkd.errors import MethodError, unknown

NEEDS = {
    "bn": "a teacher with BatchNorm; none where method.bn, the weight of that term, is 0",
    "embeddings": "label texts (class names; a random table stands in)",
    "data": "real images",
    "second_order": "a student that can be differentiated twice",
}
"""What a word in `Method.needs` means."""
BASES = {
    "code": "the authors' published code",
    "re-implementation": "code of others; the authors published none",
    "reconstructed": "abstract, notes or reviews; what they leave open is a switch",
    "own": "a definition of ours",
}
"""What an implementation rests on."""
TERMS = {
    "oh": "generator: cross-entropy of the class that the teacher is to name, or names",
    "bn": "generator: BatchNorm statistics of the images against the teacher's",
    "adv": "generator: student and teacher apart",
    "balance": "generator: all classes equally frequent in a batch",
    "ie": "generator: all classes equally frequent in a batch",
    "cr": "generator: images told apart among all made before",
    "act": "generator: strong features of the teacher",
    "dis": "generator: Jensen-Shannon divergence of student and teacher",
    "kl": "student: KL(teacher ‖ student) at temperature tau",
    "gap": "student: distance from the teacher's logits or beliefs",
    "at": "student: attention maps of teacher and student",
    "pixels": "VAE: images reconstructed",
    "logits": "VAE: the teacher's answers to them reconstructed",
    "feature": "VAE: the teacher's features reconstructed (feat_recon)",
    "kld": "VAE: Kullback-Leibler term of the latents",
    "leak": "VAE: the latents' objective, whose gradient the release does not clear",
}
"""Terms that several methods have, as they are named in logs."""


@dataclass(frozen=True)
class Card:
    """The declaration `CARD = Card(...)` of a method's file, all literals.

    Attributes:
      paper: authors and title. venue: where, without the year. year: of that. basis: a key of `BASES`.
      source: what exactly it follows, and where it departs from it.
      needs: words of `NEEDS`, as `Method.needs` of its class has them. terms: names of `TERMS`, or "name: meaning" for a term of its own.
      also: what some settings need beside that, or "".
    """

    paper: str
    venue: str
    year: int | None
    basis: Literal["code", "re-implementation", "reconstructed", "own"]
    source: str
    needs: tuple[str, ...]
    terms: tuple[str, ...]
    also: str = ""

    def check(self, file: Path) -> Card:
        """The card itself, if its words are known ones.

        Raises:
          MethodError: a word that is none, with the nearest and the file.
        """
        shared = [term for term in self.terms if ": " not in term]
        for kind, said, known in (("terms", shared, TERMS), ("needs", self.needs, NEEDS), ("basis", (self.basis,), BASES)):
            for word in said:
                if word not in known:
                    own = " A term of its own is 'name: meaning'." if kind == "terms" else ""
                    raise MethodError(f"CARD of '{file}', {kind}: {unknown('word', word, known)}{own}")
        return self

    @property
    def published(self) -> str:
        """Venue and year, such as `CVPR 2024`; empty where there is no paper."""
        return f"{self.venue} {self.year}" if self.year else self.venue

    @property
    def meanings(self) -> dict[str, str]:
        """The terms as they are named in logs → what they are."""
        split = (term.partition(": ") for term in self.terms)
        return {name: said or TERMS[name] for name, _, said in split}


def read(source: Path) -> tuple[str, Card | None]:
    """The docstring of a method's file as one paragraph, and its card, or None where it declares none. Nothing is executed.

    Raises:
      MethodError: a word in the card that is not known.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    about = " ".join((ast.get_docstring(tree) or "").split())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and getattr(node.targets[0], "id", "") == "CARD":
            return about, Card(**{k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}).check(source)
    return about, None
