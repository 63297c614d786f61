"""Answers from a policy and scores for them: sampling, decoding, scoring, chat.

Importing most of it imports torch.
"""
