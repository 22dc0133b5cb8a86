--- The last known good membership, on disk.
--
-- Why: OpenResty must serve after a restart although nobody pushes. The file is one line of JSON
-- with revision, length and checksum, then the packed upstreams as they lie in the dict. It is
-- written beside the old one, synced and renamed; the old one stays as `membership.prev`. Writing
-- is off the request path and never more often than costs a twentieth of one worker's time.

local codec = require "tidegate.codec"
local json = require "tidegate.json"
local lock = require "tidegate.lock"
local posix = require "tidegate.posix"
local store = require "tidegate.store"

local ctl = ngx.shared.tidegate_ctl

local byte = string.byte
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
local tostring = tostring
local type = type
local update_time = ngx.update_time

local FORMAT = 1
local LOCK = "persist"
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


-- The file's content. `breathe` is called between upstreams.
local function snapshot(revision, breathe)
    local parts, count = {}, 0
    for _, name in ipairs(store.names()) do
        local blob = store.get(name)
        if blob then
            count = count + 1
            parts[#parts + 1] = put_number(#name) .. put_number(#blob)
            parts[#parts + 1] = name
            parts[#parts + 1] = blob
        end
        breathe()
    end
    local body = concat(parts)
    local head = json.encode({
        format = FORMAT,
        revision = revision,
        writer = ctl:get("writer") or "",
        upstreams = count,
        bytes = #body,
        crc32 = crc32(body),
    })
    return head .. "\n" .. body
end


local function replace_in_thread(target, data)
    local ok, done, result, err = pcall(ngx.run_worker_thread, "tidegate",
                                        "tidegate.persist_thread", "replace", target, data)
    if not ok or not done then
        return posix.replace(target, data)
    end
    return result, err
end


-- Writes what is in force, if it is not on disk yet.
local function write(replace, breathe)
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
    local ok, err = replace(path, snapshot(revision, breathe))
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
    local ok, err = pcall(write, replace_in_thread, store.breathe)
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
    if token then
        posix.await_replaced(path, FLUSH_PATIENCE)
    end
    write(posix.replace, function() end)
end


local function parse(data)
    local line_end = find(data, "\n", 1, true)
    local head = line_end and json.decode(sub(data, 1, line_end - 1))
    if type(head) ~= "table" or head.format ~= FORMAT then
        return nil, "is not of format " .. FORMAT
    end
    local body = sub(data, line_end + 1)
    if #body ~= head.bytes then
        return nil, "has " .. #body .. " bytes of " .. tostring(head.bytes)
    end
    if crc32(body) ~= head.crc32 then
        return nil, "does not have the checksum that it says"
    end
    local upstreams, at = {}, 1
    for _ = 1, head.upstreams do
        local name_size, blob_size = get_number(body, at), get_number(body, at + 4)
        if not blob_size then
            return nil, "has fewer upstreams than it says"
        end
        local name_at = at + 8
        local name = sub(body, name_at, name_at + name_size - 1)
        local blob = sub(body, name_at + name_size, name_at + name_size + blob_size - 1)
        if not codec.head(blob) then
            return nil, "has a record that cannot be read"
        end
        upstreams[name] = blob
        at = name_at + name_size + blob_size
    end
    return { revision = head.revision, writer = head.writer, upstreams = upstreams }
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
