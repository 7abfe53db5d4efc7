"""What runs in the room's job processes: `import`, `merge` and `export`.

Responsibility: hand the process its handlers. Does not know what they do.
"""

from __future__ import annotations

import os

from arriero.merging.export import export
from arriero.merging.importing import import_source
from arriero.merging.merge import merge
from arriero.operations.job import main

if __name__ == "__main__":
    # Libraries' bars would fill the kept log; progress is told by `Job.progress`.
    os.environ.update(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    main({"import": import_source, "merge": merge, "export": export})
