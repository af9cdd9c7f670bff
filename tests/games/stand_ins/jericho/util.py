spacy_nlp = None
