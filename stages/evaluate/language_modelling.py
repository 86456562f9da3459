"""Language modelling: how well held-out text is predicted, in the domain of the training and out.

Perplexity is per token and therefore comparable only between models of one tokenizer; for other
pairs it is a gap. Bits per byte of UTF-8 stand beside it and compare any two models.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate.base import Evaluation, Metric, Request, Response
from stages.evaluate.examples import answers, clusters, qualified
from stages.evaluate.techniques import Contrastive, DoLa


class Perplexity(Evaluation):
    """Perplexity and bits per byte of texts in and out of domain."""

    kind: Literal["perplexity"] = "perplexity"
    in_domain: tuple[str, ...] = ()
    """Data sets of texts like those that were trained on."""
    out_of_domain: tuple[str, ...] = ()
    split: str = "test"
    window: Annotated[int, Field(ge=2)] = 1024
    """Tokens that are read at once, fewer where the model's context is shorter."""

    VERSION: ClassVar[int] = 2
    axis: ClassVar[str] = "language_modelling"
    units: ClassVar[dict[str, str]] = {"logprob": "tokens"}

    @property
    def primary(self) -> str:
        """Bits per byte out of domain, or in domain where there is nothing else."""
        return f"{'out_of_domain' if self.out_of_domain else 'in_domain'}_bits_per_byte"

    @model_validator(mode="after")
    def _domains(self) -> "Perplexity":
        named = (*self.in_domain, *self.out_of_domain)
        if not named or len(set(named)) < len(named):
            raise ValueError("in_domain and out_of_domain must name a data set, each one once")
        if isinstance(self.technique, DoLa):
            raise ValueError(
                "the scores of dola are no probabilities and have no perplexity; remove technique"
            )
        if isinstance(self.technique, Contrastive) and self.technique.alpha:
            raise ValueError(
                "contrastive rules tokens out by alpha, which have no probability then and the "
                "text no perplexity; set alpha to 0, or remove technique"
            )
        return self

    @property
    def outside(self) -> tuple[str, ...]:
        """The texts out of domain."""
        return self.out_of_domain

    def datasets(self) -> dict[str, str]:
        """Every domain and the split."""
        return {domain: self.split for domain in (*self.in_domain, *self.out_of_domain)}

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        return {domain: "text" for domain in self.datasets()}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One request per text, domain by domain."""
        return [
            Request(id, text, window=self.window)
            for domain in self.datasets()
            for id, text in zip(
                qualified(domain, data[domain]["id"]), data[domain]["text"], strict=True
            )
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per text: ``logprob`` (nats, summed over its tokens), ``tokens`` and ``bytes``.

        From these sums every summary is computed; no mean over texts of different length is taken.
        """
        parts = []
        for domain in self.datasets():
            frame = data[domain]
            ids = qualified(domain, frame["id"])
            found = answers(ids, responses)
            inside = domain in self.in_domain
            parts.append(
                pd.DataFrame(
                    {
                        "example_id": ids,
                        "document": clusters(domain, frame["document"]),
                        "subset": "in domain" if inside else "out of domain",
                        "prompt": frame["text"].tolist(),
                        "gold": "",
                        "prediction": "",
                        "answer": "",
                        "domain": domain,
                        "logprob": [response.logprobs[0] for response in found],
                        "tokens": [float(response.tokens[0]) for response in found],
                        "bytes": [float(len(text.encode())) for text in frame["text"]],
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def metrics(self) -> tuple[Metric, ...]:
        """Means over domains, the worst one, the gap, and each domain's own numbers; the primary
        one first."""
        sides = {
            "out_of_domain": ("out of domain", self.out_of_domain),
            "in_domain": ("in domain", self.in_domain),
        }
        metrics = []
        for side, (title, domains) in sides.items():
            if domains:
                mean = ", mean of domains" if len(domains) > 1 else ""
                for measure in ("bits_per_byte", "perplexity"):
                    metrics.append(
                        _over_domains(
                            f"{side}_{measure}",
                            measure,
                            domains,
                            f"{measure.replace('_', ' ')} {title}{mean}",
                        )
                    )
            if len(domains) > 1:
                metrics.append(
                    _over_domains(
                        f"{side}_worst_bits_per_byte",
                        "bits_per_byte",
                        domains,
                        f"bits per byte {title}, worst",
                        over=np.max,
                    )
                )
        if self.in_domain and self.out_of_domain:
            metrics.append(
                _over_domains(
                    "bits_per_byte_gap",
                    "bits_per_byte",
                    self.out_of_domain,
                    "bits per byte lost: out of domain minus in domain",
                    minus=self.in_domain,
                )
            )
        if len(self.datasets()) > 1:
            metrics += [
                _over_domains(f"{measure}/{domain}", measure, (domain,), f"{title} on {domain}")
                for domain in self.datasets()
                for measure, title in (
                    ("bits_per_byte", "bits per byte"),
                    ("perplexity", "perplexity"),
                )
            ]
        return tuple(metrics)


def _over_domains(
    name: str,
    measure: str,
    domains: tuple[str, ...],
    label: str,
    minus: tuple[str, ...] = (),
    over: Callable[..., np.ndarray] = np.mean,
) -> Metric:
    """The mean (or ``over``) over domains of a measure, less its mean over others."""
    everything = (*domains, *minus)
    unit = "bytes" if measure == "bits_per_byte" else "tokens"

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        sums = scores[["logprob", unit]].to_numpy(dtype=float)
        inside = np.stack([(scores["domain"] == d).to_numpy() for d in everything], axis=1)
        return (inside[:, :, None] * sums[:, None, :]).reshape(len(scores), -1)

    def value(sums: np.ndarray) -> np.ndarray:
        sums = sums.reshape(*sums.shape[:-1], len(everything), 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            nats = -sums[..., 0] / sums[..., 1]
        values = nats / np.log(2) if measure == "bits_per_byte" else np.exp(nats)
        found = over(values[..., : len(domains)], axis=-1)
        return found - values[..., len(domains) :].mean(axis=-1) if minus else found

    return Metric(
        name,
        statistics,
        value,
        higher_is_better=False,
        label=label,
        datasets=everything,
        per=unit if unit == "tokens" else "",
    )
