"""Does a router find the right one of a million entries? Product keys on the clustered grid, before and after training.

    python benchmarks/knowledge_retrieval.py [--side 1024] [--steps 1200] [--filler 0] [--names 0]

Entries are synthetic facts: an entity (2 or 3 tokens of 6,000), one of 8 relations (2 tokens) and a value that the key
part does not hold; every entity occurs with several relations. A query is the window code at the last token of the key
part. With up to `--filler` ordinary words (in no key part: they have no code, but take places of the window) before
the entity and before the relation, and up to `--names` tokens of other names at the beginning, as in running text;
with neither, and no decay, it is the entry's own code. Measured: the share of entries whose slot is among the best 16,
64 and 256 of all cells.

    means     queries are the codes, keys the mean codes of rows and columns: nothing is trained
    trained   queries from a network code -> 256 -> 2 x 128, keys 2 x side x 128; cross entropy of the right row and the
              right column, on 90 % of the entries; told for the other 10 %, which it never saw
    random    the same training on a grid filled at random: what the layout is worth (`--random-layout`)
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.knowledge.codes import window_codes
from minilm.knowledge.store import KnowledgeStore, means
from minilm.models.product_keys import best_cells

TOKENS, RELATIONS, NAMES, FOUND_AT = 6400, 8, 6000, (16, 64, 256)
KEY_TOKENS = 5


def facts(side: int, share: float, seed: int) -> tuple[KnowledgeStore, Tensor]:
    """A store of facts; the key part of each entry [n, 5] (0 where a name has 2 tokens)."""
    generator = torch.Generator().manual_seed(seed)
    num_entries = int(side * side * share)
    num_entities = side * side // RELATIONS
    names = torch.randint(1, NAMES, (num_entities, 3), generator=generator)
    names[torch.rand(num_entities, generator=generator) < 0.5, 0] = 0
    relations = NAMES + torch.arange(2 * RELATIONS).view(RELATIONS, 2)
    pairs = torch.randperm(side * side, generator=generator)[:num_entries]
    keys = torch.cat((names[pairs // RELATIONS], relations[pairs % RELATIONS]), dim=1)
    inside = keys > 0
    values = torch.randint(NAMES + 2 * RELATIONS, TOKENS, (num_entries, 1), generator=generator)
    settings = {
        "side": side,
        "width": KEY_TOKENS + 1,
        "code_dim": 64,
        "vocab_size": TOKENS,
        "seed": seed,
        "tokenizer": {"name": "none: synthetic ids", "fingerprint": "synthetic"},
    }
    lengths = inside.sum(dim=1)
    store = KnowledgeStore.assemble(
        settings,
        ids=torch.cat((keys, values), dim=1),
        lengths=torch.full((num_entries,), KEY_TOKENS + 1),
        keys=keys[inside],
        key_starts=torch.cumsum(lengths, 0) - lengths,
        offsets=torch.zeros(num_entries, dtype=torch.int64),
        classes=torch.arange(TOKENS),
    )
    return store, keys


def queries(
    store: KnowledgeStore, keys: Tensor, args: argparse.Namespace, generator: torch.Generator
) -> Tensor:
    """[n, 64] window codes at the end of the key parts `keys` [n, 5]."""
    if args.filler == args.names == 0:
        return window_codes(store.token_codes(), keys, decay=1.0)[:, -1]

    def some(first: int, end: int, most: int) -> Tensor:
        drawn = torch.randint(first, end, (len(keys), most), generator=generator)
        return drawn * (torch.arange(most) < torch.randint(most + 1, (len(keys), 1), generator=generator))

    ordinary = (NAMES + 2 * RELATIONS, TOKENS, args.filler)
    row = torch.cat(
        (some(1, NAMES, args.names), some(*ordinary), keys[:, :3], some(*ordinary), keys[:, 3:]), dim=1
    )
    # What is not there moves to the left end and counts as padding.
    row = row.gather(1, (row > 0).long().argsort(dim=1, stable=True))
    return window_codes(store.token_codes(), row, (row > 0).long())[:, -1]


class Router(nn.Module):
    """Codes [n, 64] -> scores of rows and of columns, [n, side] each."""

    def __init__(self, store: KnowledgeStore, width: int = 256, half: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(store.code_dim, width), nn.GELU(), nn.Linear(width, 2 * half))
        projection = torch.linalg.qr(torch.randn(half, store.code_dim)).Q
        both = torch.stack([store.row_means, store.column_means])
        self.keys = nn.Parameter(F.layer_norm(both @ projection.T, (half,)))
        self.direct = nn.Linear(store.code_dim, 2 * half, bias=False)
        self.direct.weight.data.copy_(torch.cat((projection, projection)))
        nn.init.zeros_(self.net[2].weight)
        self.scale = nn.Parameter(torch.zeros(()))
        self.half_dim = half

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        asked = (self.direct(codes) + self.net(codes)).unflatten(-1, (2, self.half_dim))
        asked = F.layer_norm(asked, (self.half_dim,)) * self.scale.exp() / self.half_dim**0.5
        keys = F.layer_norm(self.keys, (self.half_dim,))
        return asked[:, 0] @ keys[0].T, asked[:, 1] @ keys[1].T


def found(rows: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
    """bool [3]-counts: how many of these slots are among the best 16, 64, 256 cells."""
    best = best_cells(rows, columns, max(FOUND_AT))[1] == slots[:, None]
    return torch.stack([best[:, :k].any(dim=1).sum() for k in FOUND_AT])


@torch.no_grad()
def measured(
    store: KnowledgeStore, keys: Tensor, rows: Tensor, args: argparse.Namespace, router: Router | None
) -> str:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(len(FOUND_AT))
    for some in rows.split(512):
        codes = queries(store, keys[some], args, generator)
        if router is None:
            scores = [2 * codes @ m.T - (m * m).sum(dim=1) for m in (store.row_means, store.column_means)]
        else:
            scores = list(router(codes))
        total += found(scores[0], scores[1], store.slots[some].long())
    return "   ".join(f"top {k}: {float(n) / len(rows):.3f}" for k, n in zip(FOUND_AT, total, strict=True))


def train(store: KnowledgeStore, keys: Tensor, rows: Tensor, args: argparse.Namespace) -> Router:
    """A router trained on these source rows."""
    torch.manual_seed(args.seed)
    router, generator = Router(store), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    began = time.monotonic()
    for step in range(args.steps):
        some = rows[torch.randint(len(rows), (args.batch,), generator=generator)]
        slots = store.slots[some].long()
        by_row, by_column = router(queries(store, keys[some], args, generator))
        loss = F.cross_entropy(by_row, slots // store.side) + F.cross_entropy(by_column, slots % store.side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return router


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--share", type=float, default=1.0, help="of the slots that hold an entry")
    parser.add_argument(
        "--filler", type=int, default=0, help="most ordinary words before entity and relation"
    )
    parser.add_argument("--names", type=int, default=0, help="most tokens of other names at the beginning")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asked", type=int, default=4096, help="held-out entries that are asked for")
    parser.add_argument("--random-layout", action="store_true", help="fill the grid at random instead")
    args = parser.parse_args()
    if args.steps < 40:
        parser.error("--steps: at least 40, a twentieth of which warm up")
    began = time.monotonic()
    store, keys = facts(args.side, args.share, args.seed)
    if args.random_layout:
        store = shuffled(store, args.seed)
    print(f"{store}, {time.monotonic() - began:.1f} s, {torch.get_num_threads()} threads")
    print(f"filler {args.filler}, names {args.names}, random layout {args.random_layout}", flush=True)
    order = torch.randperm(store.num_entries, generator=torch.Generator().manual_seed(3))
    held_out, learned = order[: store.num_entries // 10], order[store.num_entries // 10 :]
    asked = held_out[: args.asked]
    print(f"means, nothing trained   {measured(store, keys, asked, args, None)}")
    router = train(store, keys, learned, args)
    print(f"trained, held-out        {measured(store, keys, asked, args, router)}")
    print(f"trained, learned         {measured(store, keys, learned[: args.asked], args, router)}")


def shuffled(store: KnowledgeStore, seed: int) -> KnowledgeStore:
    """The same entries in random slots."""
    order = torch.randperm(store.num_slots, generator=torch.Generator().manual_seed(seed))
    tensors = {name: value for name, value in store.tensors().items() if name != "slots"}
    tensors |= {name: tensors[name][order] for name in ("ids", "lengths", "codes", "rows")}
    tensors |= means(tensors["codes"], tensors["lengths"], store.side)
    return KnowledgeStore.sealed(store.description, tensors)


if __name__ == "__main__":
    main()
