"""Checkpoints and data sets by name: of the Hugging Face Hub, and in buckets.

| name                                | where it is                                              |
|-------------------------------------|----------------------------------------------------------|
| a path that exists                  | here: a local path is never taken for another place      |
| `OWNER/NAME`, `OWNER/NAME@REVISION` | a repository of the Hub (`hub`)                          |
| `gs://...`, `s3://...`              | a folder of a store that fsspec reaches (`buckets`)      |

`places` turns a name into a local folder. Only files that are read are fetched, each is checked
against what its place says of it, and results state where they are from (`folder.origins`).
"""
