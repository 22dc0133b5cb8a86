--- Plain memory that all workers share.
--
-- Why: a shared dict costs a lock, a hash and a search for each look at it. What is read on the
-- path of every request lies in memory that the master maps before it forks, where a look is a
-- load. It is there as long as the master is, over all reloads. Nothing here knows what it is for.

local ffi = require "ffi"

local ctl = ngx.shared.tidegate_ctl

local cast = ffi.cast
local sizeof = ffi.sizeof
local tonumber = tonumber
local typeof = ffi.typeof

local PROT_READ_WRITE = 3
local MAP_SHARED_ANONYMOUS_NORESERVE = 0x4021

pcall(ffi.cdef, "void *mmap(void *addr, size_t len, int prot, int flags, int fd, long offset);")

local _M = {}


--- Maps memory for one value of the C type `kind`, all zero, or finds what the configuration before
-- has mapped as `name`. In the master.
-- @return pointer to it
function _M.map(name, kind)
    -- A type with another layout has a memory of its own.
    local size = tonumber(sizeof(kind))
    local key = name .. "_" .. size
    local address = ctl:get(key)
    if not address then
        local memory = ffi.C.mmap(nil, size, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS_NORESERVE, -1, 0)
        if cast("intptr_t", memory) == -1 then
            error("no memory to share between workers: mmap: errno " .. ffi.errno(), 0)
        end
        address = tonumber(cast("uintptr_t", memory))
        ctl:set(key, address)
    end
    return cast(typeof("$ *", typeof(kind)), address)
end


return _M
