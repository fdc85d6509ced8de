"""Data sets from what people have: logs, Amazon reviews, RecBole files, MiniOneRec folders.

    files -> Log -> Examples -> a folder in the schema of docs/data.md, with a data card

`read.FORMATS` names the formats; to add one, add a function there that returns a `Log`, or
`Examples` where the source is split already.
"""
