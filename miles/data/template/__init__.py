"""A chat template turns a conversation into text, and says where the assistant turns lie in it.

In: messages and tools, a tokenizer with its chat template.
Out: the text, and a span for each assistant turn; or `RowRejected`. Before that, a certificate.
The spans say where turns are; which tokens of them are trained is decided in
`encoding/loss_mask.py`. README.md walks one template through these files.
Runs in the loader processes, and in the driver for `miles certify`. May import `tokens`,
`data.types` and `data.config`. No Ray; transformers only through the tokenizer it is given.
"""
