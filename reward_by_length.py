def score(prompts, answers):
    return [len(a) / 100 for a in answers]
