--- The last known good membership, on disk.
--
-- Why: OpenResty must serve after a restart although nobody pushes. The file is one line of JSON
-- with the revision, then chunks, each with its length and checksum, of packed upstreams as they
-- lie in the dict, then how many they are. It is written beside the old one, synced and renamed;
-- the old one stays as `membership.prev`. Writing is off the request path and never more often
-- than costs a twentieth of one worker's time.

local codec = require "tidegate.codec"
local json = require "tidegate.json"
local lock = require "tidegate.lock"
local posix = require "tidegate.posix"
local store = require "tidegate.store"

local ctl = ngx.shared.tidegate_ctl

local byte = string.byte
local collect = collectgarbage
local concat = table.concat
local crc32 = ngx.crc32_long
local find = string.find
local floor = math.floor
local ipairs = ipairs
local max = math.max
local min = math.min
local ngx = ngx
local now = ngx.now
local pcall = pcall
local sleep = ngx.sleep
local char = string.char
local sub = string.sub
local timer_at = ngx.timer.at
local type = type
local update_time = ngx.update_time

local FORMAT = 2
local LOCK = "persist"
local CHUNK = 65536
-- What the collector is told to do per chunk, in kB: enough that what one leaves behind is gone
-- before it adds up to much.
local STEP = 192
-- The pause after a write, as a multiple of what the write took.
local REST = 20
local MIN_REST = 0.1
local MAX_REST = 10
local FLUSH_PATIENCE = 2

local _M = {}

local path
local scheduled = false
local token                 -- of the lock, while this worker writes


local function put_number(value)
    return char(value % 256, floor(value / 256) % 256, floor(value / 65536) % 256,
                floor(value / 16777216) % 256)
end


local function get_number(text, at)
    local a, b, c, d = byte(text, at, at + 3)
    return d and a + b * 256 + c * 65536 + d * 16777216
end


-- Ways to the disk: in a thread, since fsync may take long; or at once, for a worker that ends,
-- into a file of its own: what it was writing in a thread may still be under way.
local finishing = false
local in_thread = {
    suffix = ".new",
    call = function(name, ...)
        finishing = name == "publish"
        local ok, done, result, err = pcall(ngx.run_worker_thread, "tidegate",
                                            "tidegate.persist_thread", name, ...)
        finishing = false
        if not ok or not done then
            return posix[name](...)
        end
        return result, err
    end,
}
local at_once = {
    suffix = ".last",
    call = function(name, ...)
        return posix[name](...)
    end,
}


-- Writes the file by way of `way`, chunk by chunk, so that neither time nor memory is taken for the
-- whole at once. `breathe` is called between upstreams.
local function write_file(way, revision, breathe)
    local new, begun, failed = path .. way.suffix, false, nil
    local parts, size, count, out = {}, 0, 0, json.encode({
        format = FORMAT,
        revision = revision,
        writer = ctl:get("writer") or "",
    }) .. "\n"

    local function seal()
        if size > 0 then
            local data = concat(parts)
            out = out .. put_number(#data) .. put_number(crc32(data)) .. data
            parts, size = {}, 0
        end
    end

    local function put()
        local ok, err = way.call(begun and "append" or "write", new, out)
        begun, out = true, ""
        failed = not ok and (err or "?") or nil
    end

    for _, name in ipairs(store.names()) do
        local blob = store.get(name)
        if blob then
            count = count + 1
            parts[#parts + 1] = put_number(#name) .. put_number(#blob)
            parts[#parts + 1] = name
            parts[#parts + 1] = blob
            size = size + #name + #blob
        end
        if size >= CHUNK then
            seal()
            put()
            if failed then
                return nil, failed
            end
            collect("step", STEP)
        end
        breathe()
    end
    seal()
    out = out .. put_number(0) .. put_number(count)
    put()
    if failed then
        return nil, failed
    end
    return way.call("publish", new, path)
end


-- Writes what is in force, if it is not on disk yet.
local function write(way, breathe)
    local content = ctl:get("content") or 0
    if content == (ctl:get("persisted_content") or 0) then
        return
    end
    token = token or lock.acquire(LOCK, 0)
    if not token then
        return
    end
    -- A push that comes in the middle may be in part of the file. So the file has the revision
    -- from before it, which no delta builds on any more, and is soon written again.
    local revision = ctl:get("revision") or 0
    local ok, err = write_file(way, revision, breathe)
    if ok then
        ctl:set("persisted_content", content)
        ctl:set("persisted_revision", revision)
    else
        ngx.log(ngx.ERR, "tidegate: the membership cannot be kept on disk: ", err)
    end
    lock.release(LOCK, token)
    token = nil
end


local function run()
    update_time()
    local started = now()
    local ok, err = pcall(write, in_thread, store.breathe)
    -- What a push and this have left behind: else it stays until requests have added as much.
    repeat
        store.breathe()
    until collect("step", STEP)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: the membership cannot be kept on disk: ", err)
    end
    update_time()
    if not ngx.worker.exiting() then
        sleep(min(max((now() - started) * REST, MIN_REST), MAX_REST))
    end
    scheduled = false
    if (ctl:get("content") or 0) ~= (ctl:get("persisted_content") or 0) then
        _M.schedule()
    end
end


--- Has the membership written soon, if it differs from what is on disk.
function _M.schedule()
    if not scheduled and (ctl:get("content") or 0) ~= (ctl:get("persisted_content") or 0) then
        scheduled = timer_at(0, run) and true or false
    end
end


--- Writes it now, without yielding: for a worker that ends. What it was writing in a thread comes
-- to its end first, or the older state would replace the newer one.
function _M.flush()
    if finishing then
        posix.await_published(path .. in_thread.suffix, FLUSH_PATIENCE)
    end
    write(at_once, function() end)
end


-- Adds the upstreams of `chunk`; gives how many they are, or nil and what is wrong.
local function read_chunk(chunk, upstreams)
    local count, at = 0, 1
    while at <= #chunk do
        local name_size, blob_size = get_number(chunk, at), get_number(chunk, at + 4)
        local name_at = at + 8
        local blob_at = name_at + (name_size or 0)
        at = blob_at + (blob_size or 0)
        local blob = sub(chunk, blob_at, at - 1)
        if not blob_size or not codec.head(blob) then
            return nil, "has a record that cannot be read"
        end
        upstreams[sub(chunk, name_at, blob_at - 1)] = blob
        count = count + 1
    end
    return count
end


local function parse(data)
    local line_end = find(data, "\n", 1, true)
    local head = line_end and json.decode(sub(data, 1, line_end - 1))
    if type(head) ~= "table" or head.format ~= FORMAT then
        return nil, "is not of format " .. FORMAT
    end
    local upstreams, count, at = {}, 0, line_end + 1
    while true do
        local size, sum = get_number(data, at), get_number(data, at + 4)
        if not sum then
            return nil, "has no end"
        end
        at = at + 8
        if size == 0 then
            if sum ~= count or at <= #data then
                return nil, "has other upstreams than it says"
            end
            return { revision = head.revision, writer = head.writer, upstreams = upstreams }
        end
        local chunk = sub(data, at, at + size - 1)
        if #chunk < size or crc32(chunk) ~= sum then
            return nil, "does not have the checksum that it says"
        end
        local added, err = read_chunk(chunk, upstreams)
        if not added then
            return nil, err
        end
        count = count + added
        at = at + size
    end
end


--- Sets where the file is.
function _M.configure(directory)
    path = directory .. "/membership"
end


--- Loads the last known good membership into the empty dicts, else the one before.
function _M.load()
    for _, file in ipairs({ path, path .. ".prev" }) do
        local data = posix.read(file)
        if data then
            local count
            local saved, err = parse(data)
            if saved then
                count, err = store.load(saved)
            end
            if count then
                ngx.log(ngx.NOTICE, "tidegate: revision ", saved.revision, " with ", count,
                        " upstreams loaded from ", file)
                ctl:set("persisted_revision", saved.revision)
                return true
            end
            store.clear()
            ngx.log(ngx.ERR, "tidegate: ", file, " cannot be used: ", err)
        end
    end
    return false
end


return _M
