"""Tokenization: loading and training tokenizers, and tokenizing many texts quickly.

Pieces of text that occur often are tokenized once; large data sets are spread over processes.
"""
