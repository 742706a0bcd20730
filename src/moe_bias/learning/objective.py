"""The loss of a batch of lessons, as an objective of the library.

    better answer c, other answer o    -mean_t log pi(c_t) - w log sigmoid(beta (d(c) - d(o)))
    answer y with advantage A          -mean over its forks of min(r_t A, clip(r_t) A)

d(y) = sum_t log pi(y_t) - log q(y_t), q the frozen model (DPO, arXiv 2305.18290). The first term holds the better
answer's likelihood up, which the preference alone lets fall (arXiv 2404.19733). r_t is the ratio to the version that
the update began with, clipped as DAPO does (arXiv 2503.14476); forks are the answer's tokens of highest base entropy
(arXiv 2506.01939).

Shapes: T tokens, A answers, P pairs, R rewarded answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bias.training.objectives import Now, Objective, Terms, Then, Unit, clipped_policy_loss


@dataclass(frozen=True)
class FromFeedback(Objective):
    """Answers 2i and 2i + 1 of the first `pairs` pairs are better and other; those after them are rewarded.

    `advantage` (R,) is that of each rewarded answer, `counts` (T,) bool marks the tokens that a pair differs in and
    those that learn from a reward, `log_prob` (T,) is under the version that the update began with.
    """

    pairs: int
    advantage: Tensor
    counts: Tensor
    log_prob: Tensor
    beta: float
    preference_weight: float

    @property
    def unit(self) -> Unit:
        """An answer; the other one of a pair has no loss of its own."""
        return "answer"

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss an answer, (A,)."""
        pair_loss_P = self._pair_losses(now.log_prob, then)
        paired = torch.stack([pair_loss_P, torch.zeros_like(pair_loss_P)], dim=-1).flatten()
        return Terms(torch.cat([paired, self._rewarded_losses(now.log_prob, then)]))

    def _pair_losses(self, log_prob_T: Tensor, then: Then) -> Tensor:
        tokens_A = then.per_answer(torch.ones_like(log_prob_T))[: 2 * self.pairs]
        nll_A = -then.per_answer(log_prob_T)[: 2 * self.pairs] / tokens_A
        gained_T = torch.where(self.counts, log_prob_T - then.base_log_prob, 0)
        gained_A = then.per_answer(gained_T)[: 2 * self.pairs]
        margin_P = self.beta * (gained_A[::2] - gained_A[1::2])
        return nll_A[::2] - self.preference_weight * F.logsigmoid(margin_P)

    def _rewarded_losses(self, log_prob_T: Tensor, then: Then) -> Tensor:
        advantage_A = torch.cat([self.advantage.new_zeros(2 * self.pairs), self.advantage])
        loss_T, _ = clipped_policy_loss(log_prob_T, self.log_prob, advantage_A[then.answer])
        counted_A = then.per_answer(self.counts.double())
        return (then.per_answer(torch.where(self.counts, loss_T, 0)) / counted_A)[2 * self.pairs :]
