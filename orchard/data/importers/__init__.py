"""Import data sets from logs, item lists, and the folders of RecBole, MiniOneRec and LC-Rec.

    files -> Table -> InteractionLog -> SplitExamples -> a folder in the schema of docs/data.md

`tables` reads columns of files of any layout, `roles` chooses them, `flat` and `item_list` make a
log of them. `read.Format` names the formats; to add one, add a function to `read` that returns an
`InteractionLog`, or `SplitExamples` where the source is split already.
"""
