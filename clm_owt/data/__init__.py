"""From documents to the blocks of tokens that a step trains on, without torch.

    sources           which documents a recipe means, down to a commit or a digest of each file
    corpus            its files as rows, read by `datasets` or `plain_files`
    documents         their documents as a stream that can be resumed, the validation set first
    tokenizer_files   where the tokenizer of a recipe comes from
    encoding          texts to ids
    parts             documents as tokens, by one process or several, file by file of the source
    packing           tokens cut into blocks and written as shards
    token_store       the shards on disk, as a run reads them
    order             which block is the k-th of the run

`building` leads the documents of a recipe through these to a complete store, under its `store_lock`; `builder` does so
in a process beside the training. `python_docs` is the built-in corpus, `retries` what is done about servers that fail
for a while, `shared_store` a store on the Hub, `kept_stores` those on this machine, `ngrams` the baselines that a
trained model is compared with.
"""
