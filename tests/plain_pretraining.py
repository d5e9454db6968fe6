"""Pre-training as a plain loop: one process, float32, no engine, every formula written out; for tests.

A step is one padded forward of all its texts with the logits of all their tokens, and autograd goes through all of it.
Which passages a step has, what is masked in them and what the decoder sees are the trainer's own draws.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from rag_retrieval.data.passages import open_passages
from rag_retrieval.train.pretrain.config import PretrainConfig
from rag_retrieval.train.pretrain.run import load_encoder
from rag_retrieval.train.pretrain.training_data import Example, MaskingOptions, PretrainSteps
from rag_retrieval.train.steps import StepShape


def plain_pretraining(values: dict, passages_per_step: int, factors: list[float]) -> tuple[list, dict]:
    """The loss of each step and the weights after the last. factors: of the learning rate, one for each step."""
    config = PretrainConfig(**values)
    set_seed(config.seed)
    model = load_encoder(config).train()
    tokenizer, passages = model.tokenizer, open_passages(config.train_dataset, config.passage_tokens)
    options = MaskingOptions(
        config.seed, config.loss_type, config.encoder_mlm_probability, tokenizer.mask_token_id, len(tokenizer)
    )
    steps = PretrainSteps([passages], model.text_encoder, StepShape(1, 1, 1), options)
    groups = {}
    for name, each in model.named_parameters():
        new = name.removeprefix("model.") in model.new_parameters
        decay = name.endswith("bias") or "norm" in name.lower()
        groups.setdefault((config.head_lr if new else config.lr, 0.0 if decay else 0.01), []).append(each)
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), own in groups.items()],
        eps=config.adam_epsilon, fused=False, foreach=False,
    )  # fmt: skip
    losses = []
    for step, factor in enumerate(factors):
        places = range(step * passages_per_step, (step + 1) * passages_per_step)
        examples = [steps.example(*divmod(place, len(passages))) for place in places]
        loss = step_loss(model, examples, passages, config)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
    return losses, model.model.state_dict()


def step_loss(model, examples: list[Example], passages, config: PretrainConfig) -> torch.Tensor:
    texts = [text for example in examples for text in example.texts]
    rows = [torch.from_numpy(text.encoded.ids).long() for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    outputs = model.model(ids, attention_mask=mask.long(), output_hidden_states=True)
    states = outputs.hidden_states[-1]
    wanted = [torch.from_numpy(text.ids).long() for text in texts]
    masked = [
        F.cross_entropy(logits[text.places], own[text.places], reduction="none")
        for logits, text, own in zip(outputs.logits, texts, wanted, strict=True)
    ]
    loss = torch.cat(masked).mean()
    if config.loss_type == "span_pairs":
        vectors = states[:, 0]
        if config.pooling == "mean":
            vectors = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return loss + span_loss(F.normalize(vectors), examples, passages, config.temperature)
    decoded, bags = [], []
    for place, (example, own) in enumerate(zip(examples, wanted, strict=True)):
        length = len(own)
        embeddings = model.model.get_input_embeddings()(own)
        found = model.decoder(
            states[place, :1], embeddings, torch.tensor([length], dtype=torch.int32).numpy(),
            torch.tensor([example.seed]).numpy(), config.decoder_mlm_probability, 1,
        )  # fmt: skip
        decoded.append(F.cross_entropy(model.model.cls(found), own[1:-1], reduction="none"))
        # not amax, which shares the gradient of equal logits: those of [PAD], whose embedding is 0
        largest = outputs.logits[place, 1 : length - 1].max(dim=0).values
        bags.append(-largest.log_softmax(dim=0)[own[1:-1].unique()].mean())
    return loss + torch.cat(decoded).mean() + config.bag_of_words_weight * torch.stack(bags).mean()


def span_loss(vectors: torch.Tensor, examples: list[Example], passages, temperature: float) -> torch.Tensor:
    """The first span of each passage against all other spans of the step, and its second one too, in one denominator;
    not against those of passages with the same text."""
    first, second = vectors[::2], vectors[1::2]
    texts = [passages.text(example.place) for example in examples]
    terms = []
    for i in range(len(examples)):
        others = [j for j in range(len(examples)) if texts[j] != texts[i]]
        cosines = [first[i] @ second[i], first[i] @ second[i]]
        for j in others:
            cosines += [first[i] @ second[j], first[i] @ first[j], second[i] @ first[j], second[i] @ second[j]]
        logits = torch.stack(cosines) / temperature
        terms.append(logits.logsumexp(0) - logits[0])
    return torch.stack(terms).mean()
