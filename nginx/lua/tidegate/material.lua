--- Certificates with their keys, and CAs: what their files last said that made sense.
--
-- Why: files are renewed while traffic runs, one after the other and sometimes wrongly. What was
-- good stays in a shared dict, for all workers and over reloads, until something better is read.
-- It is in memory only: keys are never written or logged.
--
-- In the dict: `n<id>` → number, `b<number>` → content, immutable. Content is added before its
-- number is given out and deleted after the next one is.

local posix = require "tidegate.posix"
local x509 = require "tidegate.x509"

local ctl = ngx.shared.tidegate_ctl
local dict = ngx.shared.tidegate_certificates

local concat = table.concat
local find = string.find
local ipairs = ipairs
local ngx = ngx
local pairs = pairs
local sub = string.sub

local SEPARATOR = "\0"
local RETRY = 30            -- seconds after which what was refused is read again, changed or not
local SETTLING = 1          -- seconds that a problem may last unreported while the last good serves
local MAX_OPEN = 2000       -- parsed ones in a worker; more are parsed again when they are needed

local _M = {}

local opened, open_count = {}, 0    -- id → what a worker has parsed of the current number


--- Unix time as people read it.
function _M.date(time)
    return os.date("!%Y-%m-%dT%H:%M:%SZ", time)
end


local function problem(reason, message, refused)
    return { reason = reason, message = message, refused = refused }
end


local function read(path, kind, what)
    local data, stamp, missing = posix.read_stamped(path)
    if not data then
        return nil, problem(kind .. (missing and "_missing" or "_unreadable"),
                            what .. " cannot be read: " .. stamp, true)
    end
    return data
end


local function read_pair(material)
    local certificate, key = material.paths[1], material.paths[2]
    local pem, err = read(certificate, "certificate", "the certificate")
    if not pem then
        return nil, err
    end
    local key_pem
    key_pem, err = read(key, "certificate", "the key")
    if not key_pem then
        return nil, err
    end
    return pem .. SEPARATOR .. key_pem
end


local function parse_pair(material, content)
    local certificate, key = material.paths[1], material.paths[2]
    local at = find(content, SEPARATOR, 1, true)
    local pem, key_pem = sub(content, 1, at - 1), sub(content, at + 1)
    local chain, err = x509.chain(pem)
    if not chain then
        return nil, problem("certificate_unreadable", "the certificate " .. certificate .. " "
                            .. err, true)
    end
    local parsed
    parsed, err = x509.key(key_pem)
    if not parsed then
        return nil, problem("certificate_unreadable", "the key " .. key .. " " .. err, true)
    end
    if not x509.belongs(chain, parsed) then
        return nil, problem("certificate_key_mismatch", "the key " .. key
                            .. " does not belong to the certificate " .. certificate, true)
    end
    local from, to = x509.validity(chain)
    return {
        chain = chain, key = parsed, pem = pem, key_pem = key_pem, not_before = from,
        not_after = to,
    }
end


local function read_ca(material)
    return read(material.paths[1], material.kind, "the CA")
end


local function parse_ca(material, content)
    local chain, err = x509.chain(content)
    if not chain then
        return nil, problem(material.kind .. "_unreadable", "the CA " .. material.paths[1] .. " "
                            .. err, true)
    end
    return { chain = chain, pem = content }
end


--- A certificate with its key, by the paths of their files (which may be one).
function _M.pair(certificate, key)
    return {
        id = "p" .. certificate .. "\n" .. key,
        paths = { certificate, key },
        read = read_pair,
        parse = parse_pair,
    }
end


--- The certificates of a CA, by the path of their file.
-- @param kind what its problems begin with: `client_ca`
function _M.ca(path, kind)
    return { id = "a" .. path, kind = kind, paths = { path }, read = read_ca, parse = parse_ca }
end


-- The current number and content.
local function current(material)
    for _ = 1, 3 do
        local number = dict:get("n" .. material.id)
        local content = number and dict:get("b" .. number)
        if content or not number then
            return number, content
        end
    end
    return nil
end


local function store(material, content, before)
    local number = ctl:incr("materials", 1, 0)
    local ok, err = dict:safe_add("b" .. number, content)
    if ok and before then
        ok, err = dict:safe_set("n" .. material.id, number)
    elseif ok then
        -- Another worker may be doing the same.
        ok, err = dict:safe_add("n" .. material.id, number)
        if err == "exists" then
            dict:delete("b" .. number)
            return nil
        end
    end
    if not ok then
        dict:delete("b" .. number)
        return problem("certificate_no_room", "there is no room for it (" .. err
                       .. "); raise TIDEGATE_DICT_SIZE", not before)
    end
    if before then
        dict:delete("b" .. before)
    end
    return nil
end


-- Reads the files, and makes what they say the current content if it is good, and better than
-- what there is. @return nil or a problem
local function take(material, at)
    local number, stored = current(material)
    local content, err = material.read(material)
    local parsed
    if content and content ~= stored then
        parsed, err = material.parse(material, content)
    end
    if err then
        err.refused = not number
        return err
    end
    if not parsed then
        return nil
    end
    if stored and parsed.not_after then
        local before = material.parse(material, stored)
        local valid = before and before.not_before <= at and at < before.not_after
        if valid and at >= parsed.not_after then
            return problem("certificate_expired", "the new certificate " .. material.paths[1]
                           .. " expired at " .. _M.date(parsed.not_after)
                           .. "; the one before serves on", false)
        elseif valid and at < parsed.not_before then
            return problem("certificate_not_yet_valid", "the new certificate "
                           .. material.paths[1] .. " is valid from "
                           .. _M.date(parsed.not_before) .. " on; until then the one before serves",
                           false)
        end
    end
    return store(material, content, number)
end


local function stamps(material)
    local list = {}
    for index, path in ipairs(material.paths) do
        local stamp, err = posix.stamp(path)
        list[index] = stamp or err
    end
    return concat(list, SEPARATOR)
end


--- Takes in what has become of the files, if they have changed. Only one worker at a time does.
-- @param at Unix time
function _M.refresh(material, at)
    local stamp = stamps(material)
    local problem_before = material.problem
    if stamp == material.stamp and (problem_before and at < material.retry_at
            or not problem_before and dict:get("n" .. material.id)) then
        return
    end
    local err = take(material, at)
    material.stamp = stamp
    if not err then
        material.problem, material.retry_at, material.since = nil, nil, nil
    else
        material.problem = err
        material.retry_at = at + RETRY
        material.since = material.since or at
    end
end


--- What is wrong with the files, if that has to be told: while a pair is being replaced it is
-- half old and half new for a moment.
function _M.problem(material, at)
    local found = material.problem
    if found and (found.refused or at - material.since >= SETTLING) then
        return found
    end
    return nil
end


--- Number of the current content; nil where there is none.
function _M.number(material)
    return dict:get("n" .. material.id)
end


--- The current content, parsed for this call alone; nil where there is none.
function _M.parse(material)
    local number, content = current(material)
    return number and material.parse(material, content), number
end


--- The current content, parsed, as this worker keeps it; nil where there is none. Where nothing
-- has been read yet, this worker does it: once a second at most, for all.
-- @return `{number, chain, key, pem, key_pem, not_before, not_after}`
function _M.open(material)
    local id = material.id
    local number = dict:get("n" .. id)
    local known = opened[id]
    if known and known.number == number then
        return known
    end
    if not number and dict:safe_add("x" .. id, 1, 1) then
        take(material, ngx.time())
    end
    local parsed
    parsed, number = _M.parse(material)
    if not parsed then
        return nil
    end
    parsed.number = number
    if not known then
        open_count = open_count + 1
        if open_count > MAX_OPEN then
            opened, open_count = {}, 1
        end
    end
    opened[id] = parsed
    return parsed
end


--- Forgets all but the given ones.
-- @param wanted set of ids
function _M.keep(wanted)
    for _, key in ipairs(dict:get_keys(0)) do
        local id = sub(key, 2)
        if sub(key, 1, 1) == "n" and not wanted[id] then
            local number = dict:get(key)
            dict:delete(key)
            if number then
                dict:delete("b" .. number)
            end
        end
    end
    for id in pairs(opened) do
        if not wanted[id] then
            opened[id] = nil
            open_count = open_count - 1
        end
    end
end


return _M
