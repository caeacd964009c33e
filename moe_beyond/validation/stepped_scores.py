"""Scores as a run has them: from the steps of a predictor, in the shape of its batches.

Steps and batches differ by rounding. A policy that ranks experts by their scores can prefer another victim for it, and
then later hits differ.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_beyond.lookahead import moments, reaches
from moe_beyond.traces.schema import padding_id
from moe_beyond.traces.trace import Trace

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor

Scores = npt.NDArray[np.float32]


def stepped_scores(predictor: "Predictor", trace: Trace, scores: Scores) -> tuple[Scores, Scores | None]:
    """Return the scores of a batch with those that steps give in their place, and those after the last token.

    The start of a sequence is read at once up to ``decode_start``, and its tokens keep their scores.

    Args:
        predictor: Fitted predictor that reads neither later tokens nor hidden states, which a run does not record.
        trace: Sequence of the run.
        scores: Scores of its batch, ``(T, H, L, E)`` float32.

    Returns:
        Scores, ``(T, H, L, E)`` float32; and those of lookahead ``"next"`` after the last token, ``(L, E)`` float32 or
        None.
    """
    lookaheads, (length, _, layers, _) = predictor.information.lookaheads, scores.shape
    stepper, stepped, after = predictor.stepper(), scores.copy(), np.full(scores.shape[2:], np.nan, np.float32)
    begin = trace.decode_start if trace.decode_start > 1 else 0
    stepper.observe_tokens(trace.token_ids[:begin], trace.experts[:begin])
    for token in range(begin, length):
        stepper.observe_token(int(trace.token_ids[token]))
        for routed, computed in moments(layers):
            if computed:
                stepper.observe_computed(routed)
            elif routed >= 0:
                experts = trace.experts[token, routed]
                stepper.observe_layer(routed, experts[experts != padding_id(experts.dtype)])
            found = stepper.scores()
            for layer in range(routed + 1, layers):
                reaching = [place for place, h in enumerate(lookaheads) if reaches(h, layer, routed, computed=computed)]
                if reaching:
                    stepped[token, reaching[0], layer] = found[layer]
            if "next" in lookaheads and routed >= 0:
                following = after if token + 1 == length else stepped[token + 1, lookaheads.index("next")]
                following[routed] = found[routed]
    return stepped, after if "next" in lookaheads else None
