"""Wing `finetune`: a model trained on one's own data, from rows checked first to a finished folder."""
