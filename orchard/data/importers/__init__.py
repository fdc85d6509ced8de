"""Import data sets from logs, Amazon reviews, RecBole files and MiniOneRec folders.

    files -> InteractionLog -> SplitExamples -> a folder in the schema of docs/data.md, with a card

`read.Format` names the formats; to add one, add a function to `read` that returns an
`InteractionLog`, or `SplitExamples` where the source is split already.
"""
