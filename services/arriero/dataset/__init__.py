"""The dataset room: rows and a tokenizer in, token ids and labels out.

Responsibility: everything between a file of rows and what a training reads.
Does not know models beyond their tokenizer.
"""
