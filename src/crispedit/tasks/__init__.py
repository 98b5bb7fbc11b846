"""Tasks about edits for lm-evaluation-harness: ``lm_eval --include_path $(crispedit tasks) --tasks crispedit_zsre``.

A task is a schema of edits (zsre, counterfact, wikibigedit), what is asked (reliability, generalization, locality), and
how: freely, or with the answer given (``_forced``; ``_likelier`` than another one). The files without a suffix hold
what tasks have in common. The file of edits is given by ``--metadata '{"edits": "FILE"}'``; ``edits.py`` reads it.
"""
