"""Limits and ids that more than one layer must agree on: each has its one home here. Imports nothing of ours."""

# Of the model: o200k_harmony (https://cookbook.openai.com/articles/openai-harmony).
VOCABULARY = 201088  # token ids 0 .. 201087; a checkpoint's embedding has as many rows
FIRST_SPECIAL = 199998  # this id and all above it are control tokens, named or reserved
ENDOFTEXT, RETURN, CONSTRAIN, CHANNEL = 199999, 200002, 200003, 200005
START, END, MESSAGE, CALL = 200006, 200007, 200008, 200012
END_OF_TURN = (RETURN, ENDOFTEXT, CALL)  # generation stops on these; END closes a message, the turn goes on

# Of the memory layout.
PAGE_TOKENS = 64  # tokens in a key/value page
SCRATCH_PAGE = 0  # padding rows write here and nobody reads it; never handed out
MAX_DECODE_ROWS = 256  # of a decode step: what the kernels take
MAX_PREFILL_SEQUENCES = 256

# Of a request; the packed inputs of a step have room for as many.
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # entries
MAX_STOP_TOKENS = 20  # the model's own included
BIAS_ENTRIES = MAX_LOGIT_BIAS + MAX_STOP_TOKENS  # until min_tokens, stop tokens are suppressed by a bias of -inf
