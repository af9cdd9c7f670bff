"""Log-probabilities of all valid actions of many states, every token computed once.

| module | what it holds |
| --- | --- |
| `requests` | the one place where texts become token ids |
| `trie` | the actions of one state as a tree of tokens |
| `items` | a state ready for the forward, and how states are put into batches |
| `forward` | chooses the way a batch is computed, and checks it against the model's own forward |
| `packed`, `padded`, `two_pass`, `plain` | the ways, one each |
| `logits` | hidden states -> log-probabilities, through the model's own code |
| `head_cache`, `trunk` | what is kept between forwards |

Trainer and engines share these functions, so a log-probability means the same everywhere.

A **row** is a place whose next-token distribution is needed, and nothing else: the end of a
state's prompt, or an inner node of its actions' trie. A **line** is a sequence of tokens that goes
through the model's layers.

Letters: `B` states of a batch, `H` tokens of the head, `S` tokens of a state behind the head (body
and nodes), `P` tokens of a prompt (head and body), `R` rows of a batch, all states together, `N`
vocabulary, `D` hidden width.
"""
