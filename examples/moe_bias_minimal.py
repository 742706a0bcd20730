"""MoE-Bias in one file of plain PyTorch: the layer, the reduced softmax, supervised training, the objective of rewards.

A frozen model's hidden states are computed once. What is trained is a layer at its output embedding W (V, D):

    b = sigmoid(alpha H + beta) sum_{e in top-k} g_e W_S (c_e + U_e V_e n(h))        z' = z + b on the support S

with h the hidden state that W reads, n(h) standardised, g the router's softmax over its k largest, and H the entropy of
the base's softmax(z). Off the support nothing moves, so that of all those logits one number a token is enough,

    R = log sum_{v not in S} exp(z_v)        log pi'(y) = z'_y - log(exp(R) + sum_{v in S} exp(z'_v))

and no step of training touches the backbone or the whole vocabulary.

It is for models without a soft-cap whose last hidden state is what W reads, as those of the Llama family.

    pip install torch transformers
    python examples/moe_bias_minimal.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Shapes: T tokens, D hidden, V vocabulary, M support, E experts, K experts a token, R rank.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Tokens:
    """What is kept of the frozen model for each token that is learned: all that training reads."""

    hidden_TD: Tensor
    token_T: Tensor
    logit_T: Tensor
    """The token's own base logit."""
    entropy_T: Tensor
    """Of the base, in nats."""
    rest_T: Tensor
    """R, in float64."""


class MoEBias(nn.Module):
    """Experts made through the output embedding, a router, and the entropy gate; it changes nothing at first."""

    def __init__(
        self, embedding_VD: Tensor, support_M: Tensor, experts: int = 4, top_k: int = 2, rank: int = 7
    ) -> None:
        super().__init__()
        hidden_size = embedding_VD.shape[1]
        self.support_M, self.rows_MD, self.top_k = support_M, embedding_VD[support_M].float(), top_k
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.directions = nn.Parameter(torch.zeros(experts, hidden_size))  # c
        self.writes = nn.Parameter(torch.zeros(experts, rank, hidden_size))  # U, transposed
        self.reads = nn.Parameter(torch.empty(experts, rank, hidden_size))  # V
        self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.router.weight, std=hidden_size**-0.5)
        nn.init.normal_(self.reads, std=hidden_size**-0.5)
        self.mean_D, self.scale_D = torch.zeros(hidden_size), torch.ones(hidden_size)

    def calibrate(self, hidden_TD: Tensor) -> None:
        """Sets n(h)."""
        self.mean_D, self.scale_D = hidden_TD.mean(0), hidden_TD.std(0).clamp(min=1e-6)

    def forward(self, hidden_TD: Tensor, entropy_T: Tensor) -> Tensor:
        """The bias (T, M) on the support."""
        normed_TD = (hidden_TD - self.mean_D) / self.scale_D
        share_TK, chosen_TK = self.router(normed_TD).softmax(-1).topk(self.top_k)
        share_TK = share_TK / share_TK.sum(-1, keepdim=True)
        gate_TE = torch.zeros(len(normed_TD), len(self.directions)).to(share_TK).scatter(-1, chosen_TK, share_TK)
        gate_TE = gate_TE * torch.sigmoid(self.alpha * entropy_T + self.beta)[:, None]
        read_TER = torch.einsum("td,erd->ter", normed_TD, self.reads)
        vector_TD = gate_TE @ self.directions + torch.einsum("te,ter,erd->td", gate_TE, read_TER, self.writes)
        return vector_TD @ self.rows_MD.T


@torch.no_grad()
def observe(logits_TV: Tensor, hidden_TD: Tensor, token_T: Tensor, support_M: Tensor) -> Tokens:
    """What is kept of some tokens, from the base's logits after which they came."""
    logits_TV = logits_TV.float()
    log_prob_TV = logits_TV.log_softmax(-1)
    rest_TV = logits_TV.double().index_fill(-1, support_M, -torch.inf)
    return Tokens(
        hidden_TD.float(),
        token_T,
        logits_TV.gather(-1, token_T[:, None]).squeeze(-1),
        -(log_prob_TV.exp() * log_prob_TV).sum(-1),
        rest_TV.logsumexp(-1),
    )


def log_prob(layer: MoEBias, tokens: Tokens) -> Tensor:
    """The log-probability pi' (T,) of each token, over the whole vocabulary, from the support's columns and R."""
    support_TM = tokens.hidden_TD @ layer.rows_MD.T + layer(tokens.hidden_TD, tokens.entropy_T)
    partition_T = torch.logaddexp(support_TM.logsumexp(-1).double(), tokens.rest_T)
    is_y_TM = layer.support_M == tokens.token_T[:, None]
    own_T = torch.where(is_y_TM.any(-1), (support_TM * is_y_TM).sum(-1), tokens.logit_T)
    return own_T - partition_T


def supervised_loss(layer: MoEBias, tokens: Tokens) -> Tensor:
    """The negative log-likelihood, a mean over the tokens."""
    return -log_prob(layer, tokens).mean()


def reward_loss(
    layer: MoEBias, tokens: Tokens, sampled_T: Tensor, advantage_T: Tensor, policy_entropy_T: Tensor, rho: float = 0.2
) -> Tensor:
    """DAPO's (arXiv 2503.14476) on the share rho of the tokens where the policy's entropy is highest (2506.01939).

    `sampled_T` are log-probabilities under the layer that sampled, `advantage_T` of each token's answer in its group.
    """
    count = math.ceil(rho * len(policy_entropy_T) - 1e-6)
    forks_T = policy_entropy_T >= policy_entropy_T.sort(descending=True).values[count - 1]
    ratio_T = (log_prob(layer, tokens) - sampled_T).exp()
    loss_T = -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - 0.2, 1 + 0.28) * advantage_T)
    return loss_T[forks_T].mean()


@torch.no_grad()
def observe_answers(model, tokenizer, questions: list[str], answers: list[str], size: int) -> tuple[Tokens, Tensor]:
    """One pass of the model over each text; the support are the tokens that it is unsure between, and the answers'."""
    hidden, token, logits = [], [], []
    for question, answer in zip(questions, answers, strict=True):
        prompt, target = prompt_of(tokenizer, question), answer_of(tokenizer, answer)
        output = model(torch.tensor([prompt + target[:-1]]), output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0, len(prompt) - 1 :])
        logits.append(output.logits[0, len(prompt) - 1 :])
        token.append(torch.tensor(target))
    hidden_TD, token_T, logits_TV = torch.cat(hidden), torch.cat(token), torch.cat(logits)
    wanted_V = logits_TV.softmax(-1).sum(0).index_fill(0, token_T.unique(), torch.inf)
    support_M = wanted_V.topk(size).indices
    return observe(logits_TV, hidden_TD, token_T, support_M), support_M


def prompt_of(tokenizer, question: str) -> list[int]:
    """A question as the model's chat template has it."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def answer_of(tokenizer, answer: str) -> list[int]:
    """An answer with the end of its turn."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@torch.no_grad()
def answer(model, tokenizer, layer: MoEBias, question: str, limit: int = 24) -> str:
    """Greedy. Keys and values are the plain model's, whatever the layer."""
    token, cache, written = torch.tensor([prompt_of(tokenizer, question)]), None, []
    while len(written) < limit:
        output = model(token, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache, logits_1V, hidden_1D = (
            output.past_key_values,
            output.logits[:, -1].float(),
            output.hidden_states[-1][:, -1],
        )
        entropy_1 = torch.distributions.Categorical(logits=logits_1V).entropy()
        logits_1V[:, layer.support_M] += layer(hidden_1D.float(), entropy_1)
        token = logits_1V.argmax(-1, keepdim=True)
        if token.item() == tokenizer.eos_token_id:
            break
        written.append(token.item())
    return tokenizer.decode(written)


def main() -> None:
    """Learns to answer sums in a way of its own, and shows a question that was in no text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--support", type=int, default=1024, help="tokens that can be moved")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = [(a, b) for a in range(2, 10) for b in range(2, 10) if (a, b) != (3, 7)]
    questions = [f"What is {a} plus {b}?" for a, b in pairs]
    answers = [f"{a + b}, captain." for a, b in pairs]
    tokens, support_M = observe_answers(model, tokenizer, questions, answers, options.support)
    layer = MoEBias(model.get_output_embeddings().weight, support_M)
    layer.calibrate(tokens.hidden_TD)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(options.steps):
        loss = supervised_loss(layer, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a token")
    print("What is 3 plus 7?", "->", answer(model, tokenizer, layer, "What is 3 plus 7?"))


if __name__ == "__main__":
    main()
