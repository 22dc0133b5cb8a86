--- The part of `tidegate.persist` that runs in a thread, with a Lua state of its own.
--
-- Why: fsync may take long, and nginx's event loop must not wait for it. A thread has none of
-- nginx's API, so only the plain module for files is used here.

local posix = require "tidegate.posix"

return {
    write = posix.write,
    append = posix.append,
    log = posix.log,
    publish = posix.publish,
}
