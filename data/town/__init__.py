"""The town: the small invented world in which every stage is trained and judged by default.

    words.py           residents, objects, places, facts: what all text is written from
    documents.py       what people there write down: the text of pretraining
    tasks.py           what people there ask, and what a good response is: one function per kind
    demonstrations.py  what demonstrators write for SFT, who are not always right or polite
    gold.py            what a response is truly worth, and annotators who know it only roughly

    python -m data.town    shows it: a document of every kind, then a task of every kind with
                           responses from best to worst

The town stands in for the web, for the demonstrators who write responses for SFT, and for the
annotators who compare responses. It has one thing that the real world never has: a gold reward that
is known exactly and that no training loss sees.
"""
