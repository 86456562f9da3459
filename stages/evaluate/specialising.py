"""Which experts take which tokens, on a loaded model: the procedures of ``specialisation.py``."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from stages.attack.questions import tokens_of
from stages.evaluate.asking import Asker, pieces
from stages.evaluate.base import Request
from stages.evaluate.intervening import refuse_dense
from stages.evaluate.showing import Shown
from stages.evaluate.specialisation import TOKEN_CLASSES, token_class
from stages.models.routes import hash_of, selected
from stages.probe.specialisation import table


class Profiler(Asker):
    """Counts the experts of each text's tokens."""

    @torch.no_grad()
    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Choices by expert and token class, row by row, layer by layer."""
        refuse_dense(self.spec, self.model)
        for row in rows:
            question = self.question(row, row["text"])
            embedded = self.victim.table[question.tokens][None]
            logprobs, routes = self.victim.routes(embedded, question)
            own = question.editable
            context = row["before"] + row["text"] + row["after"]
            request = Request(row["id"], context, self.words, chat=self.spec.chat)
            whole, spans = pieces(self.tokenizer, request, len(own))
            classes = np.array([token_class(whole, *span) for span in spans])[own.cpu().numpy()]
            drawn = np.random.default_rng(hash_of(f"{self.spec.seed}/{row['id']}"))
            shuffled = drawn.permutation(classes)
            found = {"used": {}, "tokens": {}, "permuted": {}}
            for each in routes:
                prompt = tokens_of(each, 1, len(own)).only(own)
                chosen = selected(prompt).cpu().numpy()
                found["used"][each.layer] = chosen.sum(0).tolist()
                for kind, feature in (("tokens", classes), ("permuted", shuffled)):
                    counts = table(chosen, feature, len(TOKEN_CLASSES))
                    found[kind][each.layer] = counts.flatten().tolist()
            yield {"prediction": self.labels[int(logprobs.argmax())]} | found


class ImageProfiler(Shown):
    """Counts the experts of each image's tokens."""

    def run(self) -> Iterator[dict]:
        """Choices by expert, image by image, layer by layer."""
        refuse_dense(self.spec, self.model)
        logits, routes = self.seen(self.pixels)
        counts = {
            each.layer: [selected(part).sum(0).tolist() for part in each.split(len(self.ids))]
            for each in routes
        }
        for index, prediction in enumerate(self.predictions(logits)):
            used = {layer: images[index] for layer, images in counts.items()}
            yield {"prediction": prediction, "used": used}
